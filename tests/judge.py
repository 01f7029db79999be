"""A small network that reads digits, to judge the ones that a model draws.

    python tests/judge.py FILE ...            judge these checkpoints
    python tests/judge.py --train 0 1 2       run the main job with each of these seeds, and judge what it leaves
"""
import subprocess, sys, tempfile
from pathlib import Path
import torch, torch.nn as nn, torch.nn.functional as F
from mixmix_nb.datasets import load_digits
from mixmix_nb.previews import generate
from mixmix_nb.load import load_model
from mixmix_nb.load import build_objective

class Reader(nn.Module):
    "Two convolutions and two linear layers; `body` gives the 64 features in which distances are measured."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                                  nn.MaxPool2d(2), nn.Dropout(.25), nn.Flatten(), nn.Linear(64*16, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)
    def forward(self, x): return self.head(self.body(x))

def digits():
    "The built-in digits in [-1,1] and their labels."
    d = load_digits()
    return d.x.float()/127.5-1, d.cond

def train_reader(seed=0, # of its weights and of the split
                 epochs=30): # the reader, its accuracy on 397 held-out digits
    torch.manual_seed(seed)
    x, y = digits()
    train, test = torch.randperm(len(x)).split([1400, 397])
    m = Reader(); opt = torch.optim.AdamW(m.parameters(), 2e-3, weight_decay=.01)
    for e in range(epochs):
        for i in train[torch.randperm(1400)].split(64):
            shift = torch.randint(-1, 2, (2,)).tolist() if e%2 else (0, 0)
            F.cross_entropy(m(x[i].roll(shift, (2, 3))), y[i]).backward()
            opt.step(); opt.zero_grad()
    m.eval()
    return m, (m(x[test]).argmax(1)==y[test]).float().mean().item()

@torch.no_grad()
def frechet(m, a, b): # Fréchet distance between two sets of images in the features of `m`
    fa, fb = m.body(a).double(), m.body(b).double()
    ca, cb = torch.cov(fa.T), torch.cov(fb.T)
    root = torch.linalg.eigvals(ca@cb).real.clamp(min=0).sqrt().sum()
    return (((fa.mean(0)-fb.mean(0))**2).sum() + ca.trace() + cb.trace() - 2*root).item()

def judge_run(ckpt, # a checkpoint trained on the digits
              each=50, # samples of each class, without guidance
              reader=None, # from `train_reader`
              sampler=None, steps=None): # dict: agreement, frechet, noise, floor
    "How often the reader agrees with the label asked for, and the distance to real digits next to that of noise and of real to real."
    m, _ = reader or train_reader()
    model, trained, facts = load_model(ckpt)
    y = torch.arange(10).repeat_interleave(each)
    x = torch.cat([x for _,x in generate(build_objective(trained, facts['shape']), model, y, ids=range(len(y)), shape=tuple(facts['shape']), conditioner=model.y_embedder,
                                         sampler=sampler or trained.sampler, steps=steps or trained.num_sampling_steps, batch=250)])
    real = digits()[0]; half = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return dict(agreement=(m(x).argmax(1)==y).float().mean().item(), frechet=frechet(m, x, real), noise=frechet(m, noise, real),
                floor=frechet(m, real[half[:500]], real[half[500:]]))

def train_run(seed, # of the run
              folder): # the final checkpoint of the main job
    subprocess.run([sys.executable, '-m', 'mixmix_nb.train', '--seed', str(seed), '--results-dir', folder], check=True, stdout=subprocess.DEVNULL)
    return next(Path(folder).glob('*/checkpoints/final.pt'))

def main(argv):
    reader = train_reader()
    print(f'the reader is right on {reader[1]:.1%} of held-out digits')
    show = lambda name, ckpt: print(name, {k: round(v, 3) for k,v in judge_run(ckpt, reader=reader).items()}, flush=True)
    if argv[:1]!=['--train']:
        for f in argv: show(f, f)
        return
    for seed in argv[1:]:
        with tempfile.TemporaryDirectory() as d: show(f'seed {seed}', train_run(seed, d))

if __name__=='__main__': main(sys.argv[1:])
