"""One training step of DiT-S/4 (32×32×4, fp32, eager) here and with diffusers' model of that size, in turns in one run.

    python tests/bench_step.py [--batch 8] [--rounds 15] [--device cpu]

Both do the same work: forward, MSE of the noise, backward, fused AdamW, an average of the weights. Ours adds the variational bound, the meter and its own random numbers.
"""
import argparse, copy, platform, statistics, time
import torch, torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from mixmix_nb.data import MemoryData
from mixmix_nb.diffusion import Diffusion
from mixmix_nb.models import DiT_models, num_params
from mixmix_nb.training import Trainer

p = argparse.ArgumentParser(); p.add_argument('--batch', type=int, default=8); p.add_argument('--rounds', type=int, default=15); p.add_argument('--device', default='cpu')
a = p.parse_args()
torch.manual_seed(0)
data = MemoryData(torch.randint(0, 256, (64, 4, 32, 32), dtype=torch.uint8), torch.arange(64), [str(i) for i in range(1000)]).to(a.device)
ours = Trainer(DiT_models['DiT-S/4'](), Diffusion(), data, batch=a.batch, steps=10**6, device=a.device)
theirs = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12, patch_size=4, sample_size=32,
                               num_embeds_ada_norm=1000, norm_eps=1e-6).to(a.device)
ema, params, process = copy.deepcopy(theirs).requires_grad_(False), list(theirs.parameters()), Diffusion().to(a.device)
opt = torch.optim.AdamW(params, 1e-4, weight_decay=0., fused=True)
stream = ours.data.batches(0, a.batch, 0, 10**6)

def step_ours():
    x, y, _ = next(stream)
    ours.train_step(x, y)

def step_theirs():
    i = torch.randint(0, 64, (a.batch,), device=a.device)
    x, y = data.images[i].float()/127.5-1, data.labels[i]
    t, noise = torch.randint(0, 1000, (a.batch,), device=a.device), torch.randn_like(x)
    out = theirs(process.q_sample(x, t, noise), timestep=t, class_labels=y).sample
    F.mse_loss(out[:,:4], noise).backward()
    opt.step(); opt.zero_grad()
    torch._foreach_lerp_(list(ema.parameters()), params, 1e-4)

def timed(f):
    if a.device!='cpu': torch.cuda.synchronize()
    t = time.perf_counter(); f()
    if a.device!='cpu': torch.cuda.synchronize()
    return time.perf_counter()-t

for f in (step_ours, step_theirs, step_ours, step_theirs): f()
pairs = [(timed(step_ours), timed(step_theirs)) for _ in range(a.rounds)]
us, them = (statistics.median(x) for x in zip(*pairs))
ratio = sorted(x/y for x,y in pairs)
print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {a.batch}, {a.rounds} rounds in turns')
print(f'mixmix_nb DiT-S/4   {num_params(ours.model)/1e6:.1f} M parameters  {us*1e3:7.1f} ms a step  {a.batch/us:6.1f} images/s')
print(f'diffusers DiT-S/4   {sum(q.numel() for q in params)/1e6:.1f} M parameters  {them*1e3:7.1f} ms a step  {a.batch/them:6.1f} images/s')
print(f'time here / time there: median {statistics.median(ratio):.3f}, from {ratio[0]:.3f} to {ratio[-1]:.3f}')
