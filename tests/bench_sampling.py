"""Sampling with guidance, DiT-S/4 on 32×32×4, beside diffusers' own model and loop, in turns in one process.

    python tests/bench_sampling.py [--images 8] [--steps 50] [--rounds 3] [--device cpu]

Theirs: `DiTTransformer2DModel` of that size, `DDIMScheduler`, both halves in one batch, in fp32 and converted to bf16. Ours:
what `python -m mixmix_nb.sample` does, in fp32 and with --mixed-precision bf16. Weights are random.
"""
import argparse, platform, statistics
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch.utils.benchmark import timer
from mixmix_nb.diffusion import Diffusion
from mixmix_nb.dit import make_model
from mixmix_nb.samplers import ImageNoise, ddim, guided
from mixmix_nb.speed import PRECISIONS, Tabulated, use_onednn

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name,default in (('--images', 8), ('--steps', 50), ('--rounds', 3)): parser.add_argument(name, type=int, default=default)
parser.add_argument('--device', default='cpu')
args = parser.parse_args()
device, n = torch.device(args.device), args.images
labels = torch.arange(n, device=device)

def theirs(dtype): # a function of no arguments
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=12,
                                  sample_size=32, patch_size=4, num_embeds_ada_norm=1000).to(device, dtype).eval()
    scheduler, both = DDIMScheduler(), torch.cat([labels, torch.full_like(labels, 1000)])
    def draw():
        x = torch.randn(n, 4, 32, 32, device=device, dtype=dtype)
        scheduler.set_timesteps(args.steps)
        for t in scheduler.timesteps:
            twice = torch.cat([x, x])
            out = model(twice, timestep=t.to(device).expand(2*n), class_labels=both).sample
            cond, null = out.chunk(2)
            x = scheduler.step(null+4*(cond-null), t, x).prev_sample
        return x
    return draw

def ours(precision):
    torch.manual_seed(0)
    model, objective = make_model('DiT-S/4', learn_sigma=False).to(device, PRECISIONS[precision]).eval(), Diffusion()
    use_onednn(model, device)
    every = torch.cat([labels, labels.new_full((1,), 1000)])
    def draw():
        net = guided(Tabulated(model, objective, args.steps, every), model.y_embedder, 4.)
        return ddim(objective, net, ImageNoise(0, range(n), (4, 32, 32), device), labels, steps=args.steps)
    return draw

def seconds(draw):
    start = timer()
    draw()
    return timer()-start

name = torch.cuda.get_device_name(device) if device.type=='cuda' else platform.processor() or platform.machine()
print(f'{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {n} images, {args.steps} steps, {args.rounds} rounds')
ways = {'diffusers fp32': theirs(torch.float32), 'ours fp32': ours('no'), 'diffusers bf16': theirs(torch.bfloat16), 'ours bf16': ours('bf16')}
with torch.no_grad():
    for draw in ways.values(): draw()
    rounds = [{k: seconds(draw) for k,draw in ways.items()} for _ in range(args.rounds)]
for k in ways:
    ratio = [r['diffusers fp32']/r[k] for r in rounds]
    print(f'{k:15}{1e3*statistics.median(r[k] for r in rounds)/args.steps:8.1f} ms a step, {statistics.median(ratio):.2f} times '
          f'diffusers fp32 ({min(ratio):.2f} to {max(ratio):.2f})')
