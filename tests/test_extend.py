"A user's module adds to every registry from outside the package, and the commands know its names."
import csv
from PIL import Image
from conftest import python, train

PLUGIN = '''
import torch, torch.nn as nn
from torch.utils.data import Dataset
from mixmix_nb.core import (AUTOENCODERS, CONDITIONERS, DATASETS, METRICS, MIXERS, MODELS, OBJECTIVES, SAMPLERS)
from mixmix_nb.conditioning import Conditioner
from mixmix_nb.images import DataInfo
from mixmix_nb.diffusion import Estimate, Objective
from mixmix_nb.dit import dit
from mixmix_nb.samplers import estimate, walk

def euler(objective, model, noise, cond=None, *, steps=50, clip=False, bar=False, callback=None):
    "x follows the estimated noise in a straight line."
    x = noise()
    for i,t,s in walk(objective, steps, bar):
        e = estimate(objective, model, x, t, cond, clip)
        a, b = objective.alpha_sigma(s)
        x = a*e.x0 + b*e.eps
        if callback: callback(i, x, e.x0)
    return x

class Circle(Objective):
    "cos and sin of an angle from 0 to a right one; the network predicts x0."
    prediction, learn_sigma = 'x0', False
    def timesteps(self, steps): return [1-i/int(steps) for i in range(int(steps)+1)]
    def alpha_sigma(self, t, dtype=torch.float32):
        a = torch.as_tensor(t, dtype=torch.float64)*torch.pi/2
        c, s = a.cos().clamp(min=1e-3), a.sin()
        return (c.to(dtype), s.to(dtype)) if torch.is_tensor(t) else (float(c), float(s))
    def loss(self, model, x, cond, rand):
        a, s = (v.reshape(-1, 1, 1, 1) for v in self.alpha_sigma(rand.t))
        error = (model(a*x+s*rand.noise, 1000*rand.t, cond)-x).pow(2).flatten(1).mean(1)
        return dict(loss=error, root=error.sqrt())
    def denoise(self, model, x, t, cond):
        x0 = model(x, 1000*t, cond)
        a, s = (v.reshape(-1, 1, 1, 1) for v in self.alpha_sigma(t))
        return Estimate(x0, (x-a*x0)/s.clamp(min=1e-3))

class Pool(nn.Module):
    "Every token gets the mean of all."
    def __init__(self, dim, num_heads, grid=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.unused = nn.Parameter(torch.ones(1))                   # never gets a gradient
    def forward(self, x): return self.scale*x.mean(1, keepdim=True).expand_as(x)

class Vector(Conditioner):
    "Three numbers instead of a label."
    def __init__(self, num_classes, dim, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob, self.linear = num_classes, dropout_prob, nn.Linear(num_classes, dim)
    def forward(self, cond): return self.linear(cond)
    def null(self, n): return torch.zeros(n, self.num_classes, device=self.linear.weight.device)

class Blobs(Dataset):
    "Coloured squares; the conditioning is the colour."
    info = DataInfo('blobs', (3, 16, 16), num_classes=3)
    def __len__(self): return 40
    def __getitem__(self, i):
        colour = torch.rand(3, generator=torch.Generator().manual_seed(i))
        return (colour*255).byte()[:,None,None].expand(3, 16, 16).clone(), colour

class Halve:
    "An autoencoder without weights: the latent is the image at half the size."
    name, channels, factor = 'halve', 3, 2
    def latent_size(self, size): return size//2
    def moments(self, x): return nn.functional.avg_pool2d(x, 2), torch.zeros(1, device=x.device).expand(len(x), 3, x.shape[-2]//2, x.shape[-1]//2)
    def decode(self, z): return nn.functional.interpolate(z, scale_factor=2.)
    def fingerprint(self): return 'halve'

SAMPLERS['my-euler'], OBJECTIVES['circle'], MIXERS['pool'], CONDITIONERS['vector'] = euler, lambda config, shape: Circle(), Pool, Vector
DATASETS['blobs'], AUTOENCODERS['halve'], MODELS['Mine'] = Blobs, Halve, lambda variant, **kw: dit(f'N/{variant}', **kw)
METRICS['weight'] = lambda trainer: trainer.params[0].abs().mean()
'''

def test_everything_from_outside(tmp_path):
    (tmp_path/'my_plugin.py').write_text(PLUGIN)
    train(*'--plugin my_plugin --data-path blobs --model Mine-2 --objective circle --mixer pool --conditioner vector --vae halve --sampler my-euler --metrics weight '
           '--steps 4 --ckpt-every 2 --batch-size 4 --num-sample-images 4 --num-sampling-steps 3 --num-workers 0'.split(), cwd=tmp_path)
    run, = (tmp_path/'results').iterdir()
    with open(run/'metrics.csv') as f: rows = list(csv.DictReader(f))
    assert rows and all(float(r['weight'])>0 and float(r['root'])>0 for r in rows), 'a loss term and a metric are columns'
    assert Image.open(run/'samples'/'final.png').size[0]>=4*16
    r = python('-m', 'mixmix_nb.sample', '--plugin', 'my_plugin', '--ckpt', run, '--sampler', 'my-euler', '--num-sampling-steps', 3, '--num-images', 4, cwd=tmp_path)
    assert r.returncode==0 and (tmp_path/'samples.png').exists(), r.stderr
    def draw(sampler, *more):
        args = f'--plugin my_plugin --ckpt fashion-mnist --num-sampling-steps 4 --num-images 4 --cfg-scale 4 --sampler {sampler} --out {sampler}'.split()
        r = python('-m', 'mixmix_nb.sample', *args, *more, cwd=tmp_path)
        assert r.returncode==0, r.stderr
        return (tmp_path/f'{sampler}.png').read_bytes()
    part = '--guidance-interval', '.2,.6'
    assert draw('my-euler', *part)==draw('ddim', *part)!=draw('ddim'), 'a sampler from outside obeys the options'
    r = python('-m', 'mixmix_nb.train', '--plugin', 'my_plugin', '--help', cwd=tmp_path)
    assert 'my-euler' in r.stdout and 'circle' in r.stdout
    r = python('-m', 'mixmix_nb.train', '--sampler', 'my-euler', cwd=tmp_path)
    assert r.returncode==2 and 'one of ddpm, ddim' in r.stderr

def test_a_new_column_in_an_old_run(tmp_path):
    (tmp_path/'my_plugin.py').write_text(PLUGIN)
    args = '--model DiT-N/8 --batch-size 4 --num-sample-images 0 --ckpt-every 2 --log-every 1'.split()
    train(*args, '--steps', 2, cwd=tmp_path)
    run, = (tmp_path/'results').iterdir()
    train('--resume', run, '--steps', 4, '--plugin', 'my_plugin', '--metrics', 'weight', cwd=tmp_path)
    with open(run/'metrics.csv') as f: rows = list(csv.DictReader(f))
    assert [r['step'] for r in rows]==['1', '2', '3', '4']
    assert rows[0]['weight']=='' and float(rows[3]['weight'])>0 and float(rows[0]['loss'])>0
