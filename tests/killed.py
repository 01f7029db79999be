"""Train, and be killed with SIGKILL at a chosen point, again and again: `python killed.py POINT… -- arguments of mixmix_nb.train`.

A POINT is `step:N` (after the N-th step of this life), `config:before` (the folder is claimed, its config.json not yet begun), `metrics` (half a line of
metrics.csv is written), or a place inside the writing of the first checkpoint of this life: `bytes:F` (a share F of its bytes are written), `flush:before`,
`flush:after`, `rename:before`, `rename:after`, `folder:before`, `folder:after`; with `final:` before it, inside the writing of final.pt. Each life is forked from a
process that has imported everything, and draws no curves: the last life, which is not killed, draws them. Nothing in the package knows of this file.
"""
import builtins, os, signal, sys
import matplotlib.figure, sklearn.datasets, torch
import mixmix_nb.core as core, mixmix_nb.training as tr
import mixmix_nb.data, mixmix_nb.diffusion, mixmix_nb.latents, mixmix_nb.models, mixmix_nb.speed
from mixmix_nb.train import main

die = lambda: os.kill(os.getpid(), signal.SIGKILL)
size = 16*1_287_872         # about the bytes of a checkpoint of DiT-N/8: model, EMA and two moments

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

def arm(point):
    "From here on the process dies at `point`."
    pt = 'final.pt' if point.startswith('final:') else '.pt'
    kind, _, arg = point.removeprefix('final:').partition(':')
    state = dict(steps=0, pt=None)                                  # pt: the checkpoint being written
    def open_(path, mode='r', *args, **kw):
        if kind=='config' and str(path).endswith('config.json.tmp'): die()
        f = builtins.open(path, mode, *args, **kw)
        if str(path).endswith(pt+'.tmp') and 'w' in mode:
            state['pt'] = path
            if kind=='bytes': return Torn(f, int(float(arg)*size))
        if kind=='metrics' and str(path).endswith('metrics.csv') and 'a' in mode and f.tell()>0: f.write('123,4.5'); f.flush(); die()
        return f
    tr.open = core.open = open_
    is_pt = lambda *a: state['pt'] is not None
    if kind=='flush': around('fsync', arg=='before', arg=='after', is_pt)
    if kind=='rename': around('replace', arg=='before', arg=='after', lambda a, b: str(b).endswith(pt))
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

cut = sys.argv.index('--')
for point in sys.argv[1:cut]:
    pid = os.fork()
    if not pid: arm(point); tr.Run.draw_curves = lambda self: None; main(sys.argv[cut+1:]); os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status!=-signal.SIGKILL: sys.exit(f'{point} was not hit: {status}')
    done = sorted(f for d in os.scandir('results') if os.path.isdir(c := os.path.join(d.path, 'checkpoints')) for f in os.listdir(c) if f.endswith('.pt'))
    print(f'hit {point} (newest checkpoint {done[-1][:-3] if done else "none yet"})', flush=True)
