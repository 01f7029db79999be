"""One training step of DiT-S/4 (32×32×4, eager, fp32 and bf16) beside the first edition's, in turns in one process.

    python tests/bench_step.py OLD [--batch 8] [--rounds 15] [--device cpu]

OLD is the package's folder in a checkout of the first edition: `git worktree add /tmp/old 0327af2`, then
`/tmp/old/mixmix_nb`. Both do the same work: random numbers, forward, bound of the variance, backward, fused AdamW, EMA.
Peak memory is that of a process of its own for each, on a GPU of what PyTorch allocated there.
"""
import argparse, importlib.util, platform, resource, statistics, subprocess, sys
from functools import partial
from pathlib import Path
import torch
from torch.utils.benchmark import timer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument('old', help='folder of the old package')
parser.add_argument('--batch', type=int, default=8, help='images per step')
parser.add_argument('--rounds', type=int, default=15, help='turns of each')
parser.add_argument('--device', default='cpu')
parser.add_argument('--only', nargs=2, metavar=('WHICH', 'PRECISION'), help='three steps of one side, for its memory')
args = parser.parse_args()
device = torch.device(args.device)
x, y = torch.randint(0, 256, (64, 4, 32, 32), dtype=torch.uint8, device=device), torch.arange(64, device=device)

def make_new(precision): # a function of no arguments: one step
    from mixmix_nb.data import TensorData, batches
    from mixmix_nb.images import DataInfo
    from mixmix_nb.dit import make_model
    from mixmix_nb.likelihood import ddpm_objective
    from mixmix_nb.config import Config
    from mixmix_nb.speed import use_onednn, with_autocast
    from mixmix_nb.trainer import Trainer
    data = TensorData(x, y, DataInfo('random', (4, 32, 32), [str(i) for i in range(1000)]))
    model = make_model('DiT-S/4')
    use_onednn(model, device)
    trainer = Trainer(model, ddpm_objective(Config()), data, batch=args.batch, device=device,
                      autocast=partial(with_autocast, precision=precision, device=device))
    stream = batches(data, seed=0, batch=args.batch, start=0, stop=10**6)
    return lambda: trainer.train_step(*next(stream)[:2])

def make_old(precision): # the same in the first edition
    file = Path(args.old)/'__init__.py'
    spec = importlib.util.spec_from_file_location('mixmix_old', file, submodule_search_locations=[str(file.parent)])
    sys.modules.setdefault('mixmix_old', importlib.util.module_from_spec(spec))
    load = lambda name: importlib.import_module(f'mixmix_old.{name}')
    data = load('data').MemoryData(x, y, [str(i) for i in range(1000)]).to(device)
    half = {} if precision=='no' else dict(wrap=lambda m: load('speed').in_half(m, torch.bfloat16, device))
    trainer = load('training').Trainer(load('models').DiT_models['DiT-S/4'](), load('diffusion').Diffusion(), data,
                                       batch=args.batch, steps=10**6, device=device, **half)
    stream = data.batches(0, args.batch, 0, 10**6)
    return lambda: trainer.train_step(*next(stream)[:2])

def seconds(step): # how long one call takes, on a GPU too
    start = timer()
    step()
    return timer()-start

def peak_mb(which, precision): # of three steps in a process of their own
    command = [sys.executable, __file__, *sys.argv[1:], '--only', which, precision]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

MAKE = dict(new=make_new, old=make_old)
if args.only:
    step = MAKE[args.only[0]](args.only[1])
    for _ in range(3): step()
    print(torch.cuda.max_memory_allocated()/2**20 if device.type=='cuda' else
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform=='darwin' else 2**10))
    sys.exit()
name = torch.cuda.get_device_name(device) if device.type=='cuda' else platform.processor() or platform.machine()
print(f'{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch}, {args.rounds} rounds')
peaks = {(k, p): peak_mb(k, p) for p in ('no', 'bf16') for k in MAKE}     # first: a child's peak counts its parent's
for precision in ('no', 'bf16'):
    steps = {k: make(precision) for k,make in MAKE.items()}
    for step in [*steps.values()]*2: step()                             # warm up
    rounds = [{k: seconds(step) for k,step in steps.items()} for _ in range(args.rounds)]
    for k in MAKE:
        print(f'{"fp32" if precision=="no" else precision}, {k}: {1e3*statistics.median(r[k] for r in rounds):7.1f} ms '
              f'a step, peak memory {peaks[k, precision]:,.0f} MB')
    ratio = sorted(r['new']/r['old'] for r in rounds)
    print(f'   new/old: median {statistics.median(ratio):.3f}, from {ratio[0]:.3f} to {ratio[-1]:.3f}', flush=True)
