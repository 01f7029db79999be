"""What `test_distributed.py` lets several processes do: `torchrun together.py FOLDER TASK…`; alone, the same on one process.

`fp32`, `accumulate`, `fp64`: train and save the weights. `begin`: train half of a run and save a checkpoint; `go-on`: the other half.
`stop`: runs in which one process is asked to stop at some moment. `die`: rank 1 kills itself. `refuse`: rank 0 finds something wrong.
`fail`: rank 1 has a bug. `freeze`: rank 1 says nothing more, while the other is in no collective. `sleep`: rank 1 lives, but does not come to a collective.
`clip`: gradients cut short, with pictures and losses of the average on the way. `NAME+shard`: the same with a model in shards. `overflow`: an infinite gradient in one shard.
"""
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from mixmix_nb.core import UserError
from mixmix_nb.data import load_digits
from mixmix_nb.diffusion import Diffusion, cosine_betas
from mixmix_nb.distributed import Processes, Shards, as_one, from_first, share_run, start
from mixmix_nb.models import DiT
from mixmix_nb.speed import faster
from mixmix_nb.training import Run, Trainer

folder, tasks, world = Path(sys.argv[1]), sys.argv[2:], int(os.environ.get('WORLD_SIZE', 1))

class Watched:
    "The digits as floats of the default dtype; remembers what was asked of it."
    def __init__(self): self.d, self.seen, self.begun = load_digits(), [], lambda: None
    shape = property(lambda self: self.d.shape)
    def __len__(self): return len(self.d)
    def to_model(self, x, flip, seed, step, lo): return x.to(torch.get_default_dtype())/127.5-1
    def batches(self, seed, batch, start, stop, lo=0, hi=None, workers=0):
        hi = batch if hi is None else hi
        self.begun()
        for k,b in zip(range(start, stop), self.d.batches(seed, batch, start, stop, lo, hi)):
            self.seen += range(k*batch+lo, k*batch+hi)
            yield b

def trainer(comm, steps=20, shard=False, thin=False, **kw):
    torch.manual_seed(0)
    model = DiT(8, 2, 1, 32, 2, 2, num_classes=10, learn_sigma=False)
    share, hold = comm.wrap if comm.world>1 and not shard else None, Shards(comm) if shard else None
    wrap = lambda m: faster(m, comm.device if comm.world>1 else torch.device('cpu'), grad_checkpoint=thin, share=share)
    return Trainer(model, Diffusion(cosine_betas(), 'v', 'fixed_large'), Watched(), 32, steps, comm=comm, wrap=wrap, hold=hold, **{'lr': 1e-4} | kw)

def go(t, stop=None):
    for x,y,_ in t.data.batches(t.seed, t.batch, t.step_no, stop or t.steps, t.lo, t.hi): t.train_step(x, y)
    return t

def save(t, name, **more):
    state = t.state_dict() | more
    if not t.comm.rank: torch.save(state, folder/f'{name}-{world}.pt')

def shown(t): # a picture and a loss, drawn and measured by the average
    v, quarters = t.validate(t.data, 500)
    return dict(picture=t.preview(7, '5', 2., batch=2), val=torch.tensor([v, *quarters]))

def overflow(comm, k=3):
    "Eight steps in which the shard of rank 1 has an infinite gradient once; what each process then has."
    t = trainer(comm, shard=True, scaler=torch.amp.GradScaler('cpu'))
    plain = t.hold.grads
    def grads(held, params):
        g = plain(held, params)
        if comm.rank==1 and t.step_no==k: g[2].view(-1)[0] = float('inf')
        return g
    t.hold.grads = grads
    before = [p.clone() for p in t.params]
    go(t, k); at_k = [p.clone() for p in t.params]
    go(t, k+1); kept = all(torch.equal(p, q) for p,q in zip(t.params, at_k))
    go(t, 8)
    return comm.all_names([f'scale {t.scaler.get_scale():g} skipped {t.read_meter()["skipped"]} kept {kept} moved {not torch.equal(before[0], t.params[0])}'])

def seen(t): return sorted(map(int, t.comm.all_names([f'{i:09d}' for i in t.data.seen])))

def stops(comm):
    "Eight runs; in each, one process or two are asked at a moment of their own. Returns the step each stopped at and what a checkpoint then holds."
    import torch.distributed as dist
    out, rng = [], random.Random(world)
    for i in range(8):
        c = Processes(dist.PrefixStore(f'trial{i}', comm.store), 'cpu', comm.rank, comm.world)
        t, run = trainer(c, 10**5), share_run(c, Run(folder/f'stop{world}-{i}'))
        asked = {rng.randrange(world), rng.randrange(world)} if i%2 else {rng.randrange(world)}
        if c.rank in asked:
            from threading import Timer
            t.data.begun = Timer(rng.random()*.3 + .1*c.rank*(i%2), os.kill, (os.getpid(), signal.SIGUSR1)).start   # not before `fit` listens
        else: rng.random()
        done = t.fit(run, {}, preview=dict(n=0))
        at = c.all_names([f'{t.step_no} {done}'])
        files = [f.name for f in run.checkpoints()]
        out.append(dict(at=at, files=files, seen=len(seen(t)), saved=torch.load(run.checkpoints()[0], weights_only=True)['train_steps']))
    return out

comm = start('cpu')
with as_one(comm):
    for task in tasks:
        if task=='fp32': save(go(trainer(comm)), task)
        if task=='accumulate': save(go(trainer(comm, accumulate=2)), task)
        name, _, shard = task.partition('+'); shard = bool(shard)
        if name=='clip':
            t = go(trainer(comm, shard=shard, thin=shard, accumulate=1+shard, grad_clip=.05), 8); first = shown(t)
            save(go(t), task, first=first, then=shown(t), numbers=comm.all_names([f'{sum(p.numel() for p in t.params):09d} by {comm.rank}']))
        if task=='overflow':
            found = overflow(comm)
            if not comm.rank: (folder/'overflow.json').write_text(json.dumps(found))
        if task=='begin': t = go(trainer(comm), 9); save(t, task, seen=seen(t))
        if task=='begin+shard': save(go(trainer(comm, shard=True), 9), task)
        if name in ('go-on', 'from-shards'):
            t = trainer(comm, shard=shard); t.load_state_dict(torch.load(folder/('begin-2.pt' if name=='go-on' else 'begin+shard-2.pt'), weights_only=True))
            go(t); save(t, task, seen=seen(t))
        if name=='fp64':
            torch.set_default_dtype(torch.float64); save(go(trainer(comm, 100, shard=shard)), task); torch.set_default_dtype(torch.float32)
        if task=='stop':
            found = stops(comm)
            if not comm.rank: (folder/f'stop-{world}.json').write_text(json.dumps(found))
        if task=='die':
            t = go(trainer(comm, 10**6), 3)
            if comm.rank==1: os.kill(os.getpid(), signal.SIGKILL)
            t.fit(share_run(comm, Run(folder/'died')), {}, preview=dict(n=0), log_every=10**6)
        if task=='refuse':
            def look(): raise UserError('this cannot be')
            from_first(comm, look); (folder/'went on').touch()
        if task=='fail':
            if comm.rank==1: raise KeyError('something')
            from_first(comm, lambda: time.sleep(.1)); go(trainer(comm, 10**6))
        if task=='sleep':
            if comm.rank==1: time.sleep(60)                                 # its watch goes on: it lives, and does nothing
            comm.mean(torch.ones(1))
        if task=='freeze':
            if comm.rank==1: comm.over.set(); signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(60)
