# %% [markdown]
# # A first model
#
# > A whole diffusion model in about a hundred lines, from noise to digits

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mixmix-nb/mixmix_nb/blob/main/nbs/01_first_model.ipynb)
#
# **You are here:** image → latent → tokens → blocks → noise → sample · *all of it at once, in small.*
#
# **What you will have at the end:** a model that draws the digit you ask for, trained in this notebook. Nothing is imported but torch, matplotlib and the data.
#
# **Price:** about 40 s on two CPU cores, no download. **You need:** Python and a little PyTorch; nothing about diffusion.

# %%
#| hide
import sys
if 'google.colab' in sys.modules: get_ipython().run_line_magic('pip', 'install -q git+https://github.com/mixmix-nb/mixmix_nb')

# %% [markdown]
# ## The idea
#
# It is easy to turn a photograph into noise: add a little noise, and again, until nothing is left. Turning noise into a photograph seems impossible, but each single step back is a modest task: *here is an image with a little noise; what would it look like with a little less?* A network can learn that from examples, because we can make as many examples as we like. **Guess first:** at the middle of the road, can you still tell what is in the picture?

# %%
import math
import torch
import matplotlib.pyplot as plt
from torch import nn
from torch.nn import functional as F
from sklearn.datasets import load_digits, load_sample_image
plt.rcParams.update({'figure.dpi': 100, 'image.interpolation': 'nearest'})
_ = torch.manual_seed(0)

# %% [markdown]
# `noisy` mixes an image with noise. Time runs from 0, the image, to 1, pure noise. Cosine and sine are the weights because $\cos^2+\sin^2=1$: if image and noise have variance 1, so has every mixture.

# %%
def noisy(x, t, noise):
    angle = t*math.pi/2
    return torch.cos(angle)*x + torch.sin(angle)*noise

photo = torch.tensor(load_sample_image('flower.jpg'))[50:350:3, 150:450:3].float()/127.5 - 1
noise = torch.randn_like(photo)
fig, axes = plt.subplots(1, 6, figsize=(12, 2.4), layout='constrained')
for ax, t in zip(axes, (0, .2, .4, .6, .8, 1)):
    picture = noisy(photo, torch.tensor(t), noise)
    ax.imshow(picture.add(1).div(2).clamp(0, 1))
    ax.set_title(f't = {t}')
    ax.axis('off')

# %% [markdown]
# At t = 0.6 the flower is still there, and at 0.8 its outline. The eye fills in what the noise hides, because it knows what flowers look like. That knowledge is what the network has to learn.
#
# ## The data
#
# A photograph would take hours. The digits of scikit-learn are 1,797 images of 8×8 pixels; we scale them to −1 … 1 and flatten each to 64 numbers.

# %%
digits = load_digits()
images = torch.tensor(digits.data).float()/8 - 1        # (1797, 64)
labels = torch.tensor(digits.target)                    # (1797,)

def show(x, title):
    rows = len(x)//10
    fig, axes = plt.subplots(rows, 10, figsize=(8, .85*rows+.3), layout='constrained')
    for ax, image in zip(axes.flat, x):
        ax.imshow(-image.view(8, 8), cmap='gray', vmin=-1, vmax=1)
        ax.axis('off')
    fig.suptitle(title)

first = torch.cat([images[labels==k][:3] for k in range(10)])
show(first.view(10, 3, 64).transpose(0, 1).flatten(0, 1), 'from the data: three of each digit')

# %% [markdown]
# ## The network
#
# It takes three things: the noisy image, the time (how noisy is it?) and the digit that is wanted. Each becomes a vector of the same width, and their sum goes through four layers that each add a correction. The time enters as cosines and sines of several frequencies, so that nearby times give nearby vectors and the network can still tell them apart.

# %%
class Net(nn.Module):
    def __init__(self, width=512):
        super().__init__()
        self.image = nn.Linear(64, width)
        self.time = nn.Linear(16, width)
        self.digit = nn.Embedding(10, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(4))
        self.out = nn.Linear(width, 64)

    def forward(self, x, t, digit):
        waves = t[:, None]*math.pi*torch.arange(1, 9)
        h = self.image(x) + self.time(torch.cat([waves.cos(), waves.sin()], 1)) + self.digit(digit)
        for layer in self.layers:
            h = h + layer(h)
        return self.out(h)

# %% [markdown]
# ## The loss
#
# What should it answer? We take the **velocity**: how the mixture changes as the angle grows, $v = \cos\cdot\varepsilon - \sin\cdot x$. It contains the same information as the clean image or the noise (chapter [06](06_diffusion.ipynb) compares the three), and it is a reasonable question at every time. Each training example gets a random time and fresh noise, so the network never sees the same example twice.

# %%
def loss_of(net, x, digit):
    t = torch.rand(len(x), 1)
    noise = torch.randn_like(x)
    angle = t*math.pi/2
    target = torch.cos(angle)*noise - torch.sin(angle)*x
    return F.mse_loss(net(noisy(x, t, noise), t[:, 0], digit), target)

# %% [markdown]
# ## Training
#
# Draw a batch, take the loss, follow its gradient, repeat. The learning rate falls to zero so that the weights come to rest.

# %%
def train(net, steps=2000, batch=64):
    opt = torch.optim.AdamW(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    losses = []
    for _ in range(steps):
        i = torch.randint(len(images), (batch,))
        loss = loss_of(net, images[i], labels[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        losses.append(loss.item())
    return losses

net = Net()
untrained = Net()
losses = torch.tensor(train(net))
fig, ax = plt.subplots(figsize=(8, 2.6), layout='constrained')
ax.semilogy(losses, alpha=.3, label='each step')
ax.semilogy(losses.view(-1, 50).mean(1).repeat_interleave(50), label='mean of 50 steps')
ax.set_xlabel('step')
ax.set_ylabel('loss')
ax.legend()
f'{losses[:50].mean():.2f} at the start, {losses[-50:].mean():.2f} at the end' 

# %% [markdown]
# The loss never reaches zero, and it should not: from an image that is nearly all noise, nobody can tell exactly which image it was.
#
# ## Sampling
#
# Now the way back. Start from pure noise at t = 1. Ask the network for the velocity, compute from it what it believes the clean image and the noise to be, and mix these two again with slightly less noise. After 50 such steps t is 0.

# %%
@torch.no_grad()
def sample(net, digit, steps=50):
    x = torch.randn(len(digit), 64)
    history = [x]
    times = torch.linspace(1, 0, steps+1)
    for t, next_t in zip(times[:-1], times[1:]):
        v = net(x, t.repeat(len(digit)), digit)
        angle = t*math.pi/2
        clean = torch.cos(angle)*x - torch.sin(angle)*v
        noise = torch.sin(angle)*x + torch.cos(angle)*v
        x = noisy(clean.clamp(-1, 1), next_t, noise)
        history.append(x)
    return x, history

asked = torch.arange(10).repeat(4)
x, history = sample(net, asked)
show(x, 'drawn from noise: each column was asked for one digit, 0 to 9')

# %% [markdown]
# Every image began as noise of its own, and each column shows the digit it was asked for. No two threes are alike, since no two started from the same noise. (Are they copies of training images? Exercise 3.)
#
# The same network before training, and one column of images on its way:

# %%
show(sample(untrained, torch.arange(10))[0], 'the same code with an untrained network')
path = torch.stack([history[k][3] for k in (0, 10, 20, 25, 30, 35, 40, 44, 47, 50)])
show(path, 'a 3 on its way: after 0, 10, 20, 25, 30, 35, 40, 44, 47 and 50 steps')

# %% [markdown]
# ## What comes next
#
# This is the whole of it. The rest of the course replaces these lines by better ones:
#
# | here | what it lacks | chapter |
# |---|---|---|
# | `torch.manual_seed(0)` | random numbers that survive a resume and many devices | [00 Core](00_core.ipynb) |
# | `Net`: a flat vector of 64 numbers | images of any size: a transformer over patches | [02](02_patches.ipynb), [03](03_conditioning.ipynb), [04](04_blocks.ipynb), [05](05_dit.ipynb) |
# | `noisy`, `loss_of` | why it works, what else could be predicted, a likelihood, straight paths | [06](06_diffusion.ipynb), [07](07_likelihood.ipynb), [09](09_flow.ipynb) |
# | `sample` | fewer steps, guidance | [08](08_sampling.ipynb) |
# | `images`, `labels` | folders of files | [10](10_data.ipynb) |
# | `train` | averaged weights, resuming, several devices | [11](11_training.ipynb) to [14](14_distributed.ipynb) |
# | 64 pixels | 256×256 and more | [15](15_vae.ipynb), [16](16_latents.ipynb) |
#
# ## Try it
#
# 1. Ask for `steps=1`, 2, 5 and 10 in `sample`. From how many steps on can you read the digits? Explain what one step gives.
# 2. Write `between(net, a, b)`: ten images of digit `a` on the left and digit `b` on the right, by mixing the two rows of `net.digit.weight`. What is halfway between a 3 and an 8?
# 3. Does it copy? Write `nearest(x)`, the distance from each image in `x` to the closest training image. Check it here, then compare the samples with training images that are compared with all others.

# %%
def nearest(x): ...     # (n,) distances

def check_nearest(f):
    step = F.one_hot(torch.tensor(0), 64)/10            # moves one pixel by 0.1
    assert torch.allclose(f(images[:5]), torch.zeros(5), atol=1e-2)
    assert torch.allclose(f(images[:5]+step), torch.full((5,), .1), atol=1e-2)
    return 'right'
# check_nearest(nearest)

# %% [markdown]
# [Solutions](solutions/01_first_model.ipynb)
#
# ← [00 Core](00_core.ipynb) · [02 Patches](02_patches.ipynb) →
