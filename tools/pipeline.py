"""Draw nbs/images/pipeline.png: what happens to an image in a Diffusion Transformer, with real numbers in every panel.

    python tools/pipeline.py results/000-DiT-N-2 ema      a run of the first command, and an autoencoder for photographs
"""
import sys, torch, matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from pathlib import Path
from matplotlib.cbook import get_sample_data
from matplotlib.patches import FancyBboxPatch, Rectangle
from mixmix_nb.datasets import load_digits
from mixmix_nb.load import build_objective, load_model
from mixmix_nb.samplers import ImageNoise, ddim, guided
from mixmix_nb.vae import load_vae

run, vae = sys.argv[1:]
model, config, facts = load_model(run)
objective, digits, label = build_objective(config, tuple(facts['shape'])), load_digits(), 3
x0 = digits.x[digits.cond==label][0].float()/127.5-1                                 # (1,8,8)
noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
times = objective.timesteps(50)

mixed = []                                                                          # noise is added
for t in reversed([*times[::len(times)//3][:3], times[-1]]):
    a, s = objective.alpha_sigma(t)
    mixed.append(a*x0+s*noise)
path = []                                                                           # noise is removed
start = ImageNoise(0, [23], tuple(facts['shape']))
keep = lambda i, x, x0: path.append(x[0])
ddim(objective, guided(model, model.y_embedder, 1.5), start, torch.tensor([label]), steps=50, clip=True, callback=keep)
path = [path[i] for i in (0, 19, 36, -1)]

photo = plt.imread(get_sample_data('grace_hopper.jpg'))[20:532]                     # U.S. Navy, public domain
photo = torch.tensor(photo).permute(2, 0, 1)[None].float()/127.5-1
photo = torch.nn.functional.interpolate(photo, (256, 256), mode='area')
z = load_vae(vae).moments(photo)[0][0,:3]                                            # three of the four channels, (3,32,32)
mean, std = z.mean((1, 2), keepdim=True), z.std((1, 2), keepdim=True)
z = ((z-mean)/std/4+.5).clamp(0, 1)

W, H, INK = 12., 3.7, '#333333'
fig = plt.figure(figsize=(W, H), facecolor='white')
page = fig.add_axes((0, 0, 1, 1)); page.set(xlim=(0, W), ylim=(0, H)); page.axis('off')

def picture(im, x, y, size): # at `x`, `y` in inches
    ax = fig.add_axes((x/W, y/H, size/W, size/H)); ax.axis('off')
    if im.shape[0]==1: ax.imshow(im[0].clamp(-1, 1), cmap='gray', vmin=-1, vmax=1)
    else: ax.imshow(im.permute(1, 2, 0))

def arrow(x, y, dx, dy, color=INK, lw=1.6): # from `x`, `y` in inches
    page.annotate('', (x+dx, y+dy), (x, y), arrowprops=dict(arrowstyle='-|>', color=color, lw=lw, mutation_scale=14))

X, MID = [.9, 2.95, 5., 7.05, 9.1, 11.05], 1.85                                      # centres of the columns, and their middle
stages = [('image', 'pixels', '10'), ('latent', 'large images only', '15, 16'), ('noise', 'added to train', '06, 07, 09'),
          ('tokens', 'one per patch', '02'), ('blocks', 'say what to remove', '03 to 05'), ('sample', 'noise removed', '08')]
for x,(name, what, chapters) in zip(X, stages):
    page.text(x, 3.4, name, ha='center', va='center', fontsize=15, weight='bold', color=INK)
    page.text(x, 3.12, what, ha='center', va='center', fontsize=11, color=INK)
    page.text(x, .2, f'chapter{"s" if len(chapters)>2 else ""} {chapters}', ha='center', va='center', fontsize=11, color='#777777')
half = [.75, .75, .5, .75, .7, .42]                                                  # width of what a column holds
for l,r,a,b in zip(X, X[1:], half, half[1:]): arrow(l+a, MID, r-l-a-b, 0)

picture(x0, X[0]-.6, MID-.6, 1.2)
page.add_patch(FancyBboxPatch((X[1]-.65, MID-1.3), 1.3, 2.42, boxstyle='round,pad=.05', fill=False, ls='--', ec='#999999'))
picture(photo[0]/2+.5, X[1]-.5, MID+.06, 1.)
page.text(X[1], MID-.07, '256×256 → 32×32', ha='center', va='center', fontsize=9, color=INK)
picture(z, X[1]-.5, MID-1.2, 1.)
for k in range(16):
    i, j = divmod(k, 4)
    picture(mixed[1][:,2*i:2*i+2,2*j:2*j+2], X[3]-.66+.35*j, MID+.37-.35*i, .28)
for k in range(4):
    y = MID-.98+.52*k
    page.add_patch(FancyBboxPatch((X[4]-.55, y), 1.1, .36, boxstyle='round,pad=.03', fc='#dbe7f3', ec='#4c78a8'))
    page.text(X[4], y+.18, f'block {k+1}', ha='center', va='center', fontsize=10, color=INK)
page.text(X[4], .55, 'timestep + class', ha='center', va='center', fontsize=9, color='#b25a00')
arrow(X[4], .64, 0, .2, '#b25a00', 1.2)
for k in range(4):
    picture(mixed[k], X[2]-.27, MID+.57-.6*k, .54)
    picture(path[k], X[5]-.27, MID+.57-.6*k, .54)
for x in (X[2], X[5]): arrow(x+.4, MID+1.05, 0, -2.2, '#b25a00', 1.2)
loop = dict(arrowstyle='-|>', color='#b25a00', lw=1.4, mutation_scale=14, connectionstyle='arc3,rad=-.16')
page.annotate('', (X[2]+.3, .5), (X[4]-.62, .72), arrowprops=loop)
page.text(X[3]-.35, .68, 'to sample: a little less noise, and again', ha='center', va='center', fontsize=9, color='#b25a00')
fig.savefig(Path(__file__).parent.parent/'nbs'/'images'/'pipeline.png', dpi=130)
