"""Train, and be killed with SIGKILL at a chosen point: `python killed.py POINT -- arguments of mixmix_nb.train`.

POINT is `step:N` (after the N-th step of this process), `config:before` (the folder is claimed, its config.json not yet begun), `metrics` (half a line of
metrics.csv is written), or a place inside the writing of the first checkpoint of this process: `bytes:F` (a share F of its bytes are written), `flush:before`,
`flush:after`, `rename:before`, `rename:after`, `folder:before`, `folder:after`; with `final:` before it, inside the writing of final.pt. Nothing in the package
knows of this file.
"""
import builtins, os, signal, sys
import mixmix_nb.core as core, mixmix_nb.training as tr
from mixmix_nb.train import main

final = sys.argv[1].startswith('final:')
kind, _, arg = sys.argv[1].removeprefix('final:').partition(':')
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
PT = 'final.pt' if final else '.pt'
state = dict(steps=0, pt=None)      # pt: the checkpoint being written

class Torn:
    "An open file that kills the process once `limit` bytes are written."
    def __init__(self, f, limit): self.f, self.limit, self.n = f, limit, 0
    def write(self, b):
        b = memoryview(b).cast('B')
        if self.n+len(b)>=self.limit: self.f.write(b[:self.limit-self.n]); self.f.flush(); die()
        self.n += len(b)
        return self.f.write(b)
    def __getattr__(self, k): return getattr(self.f, k)
    def __enter__(self): self.f.__enter__(); return self
    def __exit__(self, *a): return self.f.__exit__(*a)

def open_(path, mode='r', *args, **kw):
    if kind=='config' and str(path).endswith('config.json.tmp'): die()
    f = builtins.open(path, mode, *args, **kw)
    if str(path).endswith(PT+'.tmp') and 'w' in mode:
        state['pt'] = path
        if kind=='bytes': return Torn(f, int(float(arg)*size))
    if kind=='metrics' and str(path).endswith('metrics.csv') and 'a' in mode and f.tell()>0: f.write('123,4.5'); f.flush(); die()
    return f

def around(name, before, after, when):
    "Replace os.name by one that dies before or after the call, where `when()` holds."
    real = getattr(os, name)
    def f(*args, **kw):
        hit = when(*args)
        if hit and before: die()
        out = real(*args, **kw)
        if hit and after: die()
        return out
    setattr(os, name, f)

size = 16*1_274_372         # about the bytes of a checkpoint of DiT-N/2: model, EMA and two moments
tr.open = core.open = open_
is_pt = lambda *a: state['pt'] is not None
if kind=='flush': around('fsync', arg=='before', arg=='after', is_pt)
if kind=='rename': around('replace', arg=='before', arg=='after', lambda a, b: str(b).endswith(PT))
if kind=='folder':
    fsyncs = []
    around('fsync', arg=='before', arg=='after', lambda fd: is_pt() and (fsyncs.append(fd) or len(fsyncs)==2))
if kind=='step':
    real = tr.Trainer.train_step
    def train_step(self, *a, **kw):
        real(self, *a, **kw)
        state['steps'] += 1
        if state['steps']==int(arg): die()
    tr.Trainer.train_step = train_step

main(sys.argv[sys.argv.index('--')+1:])
