"""What the cache of latents is for, in turns in one run: the loader alone, a step from the cache against a step on random tensors, and DiT-S/4 at 256 px with an autoencoder of
Stable Diffusion's size (random weights) in the loop against the same steps from the cache.

    python tests/bench_latents.py [--rounds 5] [--batch 8] [--device cpu] [--skip-vae]
"""
import argparse, platform, statistics, sys, tempfile, time
from pathlib import Path
import torch
from mixmix_nb import latents as L
from mixmix_nb.core import draws
from mixmix_nb.data import MemoryData
from mixmix_nb.diffusion import Diffusion
from mixmix_nb.models import DiT_models
from mixmix_nb.training import Trainer

p = argparse.ArgumentParser(); p.add_argument('--rounds', type=int, default=5); p.add_argument('--batch', type=int, default=8); p.add_argument('--device', default='cpu'); p.add_argument('--skip-vae', action='store_true')
a = p.parse_args()
device, shape = torch.device(a.device), (4, 32, 32)
tmp = tempfile.TemporaryDirectory(); tmp_path = Path(tmp.name)
torch.manual_seed(0)

def timed(f):
    if device.type=='cuda': torch.cuda.synchronize()
    t = time.perf_counter(); f()
    if device.type=='cuda': torch.cuda.synchronize()
    return time.perf_counter()-t

def made_up(n=4096, shard=1024): # a cache on the disk, of random moments
    plan = dict(format=L.FORMAT, images=n, shape=list(shape), flip=True, posterior=True, shard=shard, image_size=256, crop='', data='made up', data_fingerprint='', contents='', vae='', vae_fingerprint='',
                scale=1., shift=0., factor=8, mean_only=False, classes=[str(i) for i in range(1000)])
    d = tmp_path/'made_up'; d.mkdir()
    for k in range(n//shard):
        t = dict(mean=torch.randn(shard, 2, *shape).half(), std=torch.rand(shard, 2, *shape).half()*.1, labels=torch.arange(shard)%1000)
        L.write_parts(L.shard_path(d, k), L.shard_parts(t, dict(plan=L.plan_digits(plan), bad='[]')))
    L.finish(d, plan)
    return d

print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}, {a.rounds} rounds in turns')

# the loader alone: order, indexing, mirror images, draws
d, B = made_up(), 256
held, mapped = L.open_cache(d).to(device), L.open_cache(d)
def load(data, workers, steps=16):
    for k,(x,y,_) in enumerate(data.batches(0, B, 0, steps, workers=workers)): z = data.to_model(x.to(device, non_blocking=True), draws(0, k, 0, B, (1,), device).flip, 0, k)
for name,data,workers in (('in memory', held, 0), ('mapped, 1 thread', mapped, 1), ('mapped, 2 threads', mapped, 2)):
    load(data, workers, 2)
    rates = sorted(16*B/timed(lambda: load(data, workers)) for _ in range(a.rounds))
    print(f'loader alone, {name:18s} {statistics.median(rates):9,.0f} latents of 4×32×32 a second (from {rates[0]:,.0f} to {rates[-1]:,.0f})')

# a step from the cache, and a step on a random tensor
model = DiT_models['DiT-S/4']()
trainer = Trainer(model, Diffusion(), held, batch=a.batch, steps=10**6, device=device)
def step(data, x, y): trainer.data, trainer.flip = data, data is not None; trainer.train_step(x.to(device, non_blocking=True), y.to(device))
def stream(data): return data.batches(0, a.batch, 0, 10**6, workers=1)
random_z, random_y = torch.randn(a.batch, *shape, device=device), torch.randint(1000, (a.batch,), device=device)
def from_random(): step(None, random_z, random_y)                    # no set: floats are taken as they are
def from_cache(data, it):
    def f(): x, y, _ = next(it); step(data, x, y)
    return f
ways = {'in memory': from_cache(held, stream(held)), 'mapped': from_cache(mapped, stream(mapped))}
def several(f, n=4): return timed(lambda: [f() for _ in range(n)])/n
for f in (from_random, *ways.values()): f(); f()
rows = [(several(from_random), *(several(f) for f in ways.values())) for _ in range(max(9, 2*a.rounds))]
base = statistics.median(r[0] for r in rows)
print(f'DiT-S/4, batch {a.batch}: a step on random tensors {base*1e3:.1f} ms')
for i,name in enumerate(ways, 1): print(f'   from the cache, {name:10s} {statistics.median(r[i] for r in rows)*1e3:.1f} ms, ratio {statistics.median(r[i]/r[0] for r in rows):.3f}')

# the VAE in the loop
if not a.skip_vae:
    from diffusers import AutoencoderKL
    vae = L.VAE(AutoencoderKL(block_out_channels=(128,256,512,512), layers_per_block=2, latent_channels=4, scaling_factor=.18215, sample_size=256, norm_num_groups=32,
                down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4), 'random', device)
    images = MemoryData(torch.randint(0, 256, (2*a.batch, 3, 256, 256), dtype=torch.uint8), torch.arange(2*a.batch), [str(i) for i in range(1000)], flip=True).to(device)
    live, encoded = L.EncodedData(images, vae), L.open_cache(L.encode(images, vae, tmp_path/'c', batch=a.batch, workers=0)).to(device)
    live_f, cache_f = from_cache(live, stream(live)), from_cache(encoded, stream(encoded))
    for f in (live_f, cache_f): f()
    pairs = [(several(live_f, 1), several(cache_f, 2)) for _ in range(a.rounds)]
    ratio = sorted(x/y for x,y in pairs)
    print(f'DiT-S/4 at 256 px, batch {a.batch}: {a.batch/statistics.median(x for x,_ in pairs):.2f} images/s with the VAE in the loop, {a.batch/statistics.median(y for _,y in pairs):.2f} from the cache')
    print(f'   {statistics.median(ratio):.1f} times as fast, from {ratio[0]:.1f} to {ratio[-1]:.1f}')
