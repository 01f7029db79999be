"""What the cache of latents is for: a step of DiT-S/4 at 256 pixels from the cache, in memory and on the disk, beside
the same step with the autoencoder in the loop, in turns.

    python tests/bench_latents.py [--rounds 5] [--batch 8] [--device cpu] [--vae FOLDER]

The autoencoder has the size of Stable Diffusion's and random weights, unless --vae names another one.
"""
import argparse, platform, statistics, tempfile, time
import torch
from torch.utils.benchmark import timer
from mixmix_nb.config import Config
from mixmix_nb.data import TensorData, batches
from mixmix_nb.images import DataInfo
from mixmix_nb.dit import make_model
from mixmix_nb.latents import EncodedData, encode, open_cache
from mixmix_nb.likelihood import ddpm_objective
from mixmix_nb.trainer import Trainer
from mixmix_nb.vae import VAE, load_vae

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument('--batch', type=int, default=8, help='images per step')
parser.add_argument('--rounds', type=int, default=5, help='turns of each')
parser.add_argument('--size', type=int, default=256, help='pixels')
parser.add_argument('--device', default='cpu')
parser.add_argument('--vae', help='a name or folder, as for training')
args = parser.parse_args()
device = torch.device(args.device)

def random_vae(): # a `VAE` of Stable Diffusion's size
    from diffusers import AutoencoderKL
    return VAE(AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                             down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4,
                             norm_num_groups=32, scaling_factor=.18215), 'random', device)

def make_step(data): # a function of no arguments: one step of training
    trainer = Trainer(make_model('DiT-S/4', input_size=data.info.shape[1:], in_channels=data.info.shape[0]),
                      ddpm_objective(Config()), data, batch=args.batch, flip=True, device=device)
    stream = batches(data, seed=0, batch=args.batch, start=0, stop=10**6)
    def step():
        x, cond, _ = next(stream)
        trainer.train_step(x.to(device, non_blocking=True), cond.to(device, non_blocking=True))
    return step

def seconds(step): # how long one call takes, on a GPU too
    start = timer()
    step()
    return timer()-start

torch.manual_seed(0)
vae = load_vae(args.vae, device) if args.vae else random_vae()
n = 2*args.batch
images = TensorData(torch.randint(0, 256, (n, 3, args.size, args.size), dtype=torch.uint8), torch.arange(n),
                    DataInfo('random', (3, args.size, args.size), [str(i) for i in range(1000)], flip=True))
name = torch.cuda.get_device_name(device) if device.type=='cuda' else platform.processor() or platform.machine()
print(f'{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch}, {args.rounds} rounds')
with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    cache = open_cache(encode(images, vae, folder, batch=args.batch))
    print(f'encoded {n} images and their mirror images: {n/(time.perf_counter()-start):.2f} images/s')
    steps = {'in the loop': make_step(EncodedData(images.to(device), vae)), 'cache on the disk': make_step(cache),
             'cache in memory': make_step(cache.in_memory(device, 2**31))}
    for step in steps.values(): step()                                  # warm up
    rounds = [{k: seconds(step) for k,step in steps.items()} for _ in range(args.rounds)]
for k in steps:
    t, ratio = statistics.median(r[k] for r in rounds), sorted(r['in the loop']/r[k] for r in rounds)
    print(f'{k:18s} {1e3*t:8.1f} ms a step, {args.batch/t:7.2f} images/s; {statistics.median(ratio):5.1f} times as '
          f'fast as in the loop, from {ratio[0]:.1f} to {ratio[-1]:.1f}')
