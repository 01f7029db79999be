"""Fréchet distance on MobileNetV2 features: of any two sets of images, and of the shipped model by sampler and calls.

    python tests/fidelity.py A.npz B.npz           two files of `python -m mixmix_nb.sample --npz`
    python tests/fidelity.py --table               write nbs/fidelity.csv (an hour on one CPU core; continues)

torch-fidelity computes the distance (`pip install 'mixmix_nb[fidelity]'`); the features are the 1,280 that MobileNetV2 of
torchvision gives before its classifier, for images scaled to 96 pixels. This is not FID, which needs InceptionV3: compare
its numbers only with each other. Sampling without guidance, labels balanced, 5,000 images; the floor is the distance of
5,000 training images from the 5,000 others that samples are compared with.
"""
import csv, os, sys
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F, torchvision
from torch.utils.data import TensorDataset
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from mixmix_nb.core import named_generator, to_uint8
from mixmix_nb.datasets import load_fashion_mnist
from mixmix_nb.load import load_model
from mixmix_nb.previews import generate
from mixmix_nb.speed import PRECISIONS, Tabulated, best_precision
from mixmix_nb.load import build_objective

FILE = Path(__file__).parent.parent/'nbs'/'fidelity.csv'

class MobileNet(FeatureExtractorBase):
    "MobileNetV2 of torchvision; the weights are in MIXMIX_DATA or downloaded."
    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        file = Path(os.environ.get('MIXMIX_DATA', ''))/'mobilenet_v2'/'mobilenet_v2-b0353104.pth'
        self.net = torchvision.models.mobilenet_v2(weights=None if file.exists() else 'IMAGENET1K_V1')
        if file.exists(): self.net.load_state_dict(torch.load(file, weights_only=True))
        self.eval()
    @staticmethod
    def get_provided_features_list(): return ('pooled',)
    @staticmethod
    def get_default_feature_layer_for_metric(metric): return 'pooled'
    @staticmethod
    def can_be_compiled(): return False
    def forward(self, x): # uint8 (B,3,H,W)
        x = F.interpolate(x.float()/255, size=96, mode='bilinear', antialias=True)
        mean, std = (torch.tensor(v)[:,None,None] for v in ((.485, .456, .406), (.229, .224, .225)))
        return (self.net.features((x-mean)/std).mean((2, 3)),)
register_feature_extractor('mobilenet-v2', MobileNet)

class Images(TensorDataset): # of uint8 (N,C,H,W)
    def __getitem__(self, i): return self.tensors[0][i].expand(3, -1, -1)

def frechet(a, b, name=None): # the distance of two sets; `name` keeps the statistics of the second
    found = calculate_metrics(input1=Images(a), input2=Images(b), input2_cache_name=name, fid=True, cuda=False, verbose=False,
                              feature_extractor='mobilenet-v2', batch_size=64, save_cpu_ram=True)
    return found['frechet_inception_distance']

@torch.no_grad()
def samples(sampler, steps, n): # uint8 (N,1,28,28)
    model, trained, facts = load_model('fashion-mnist')
    objective, cond = build_objective(trained, facts['shape']), torch.arange(n)%10
    model.to(PRECISIONS[best_precision(torch.device('cpu'))])                # bf16 where the processor has it
    parts = generate(objective, Tabulated(model, objective, steps, cond), cond, ids=range(n), shape=tuple(facts['shape']),
                     sampler=sampler, steps=steps, batch=250)
    return torch.cat([to_uint8(x) for _,x in parts])

def table(n=5000): # write the file, line by line
    data = load_fashion_mnist().x
    order = torch.randperm(len(data), generator=named_generator('fidelity'))
    real, others = data[order[:n]], data[order[n:2*n]]
    rows = list(csv.DictReader(open(FILE))) if FILE.exists() else []
    done = {(r['sampler'], int(r['calls'])) for r in rows}
    jobs = [('real images', 0)] + [(s, c) for c in (5, 10, 20, 50) for s in ('ddim', 'heun', 'dpmpp_2m', 'ddpm')] + [('ddim', 250)]
    for sampler,calls in jobs:
        steps = (calls+1)//2 if sampler=='heun' else calls                  # Heun: 2n−1 calls
        if sampler=='heun': calls = 2*steps-1
        if (sampler, calls) in done: continue
        images = others if calls==0 else samples(sampler, steps, n)
        rows.append(dict(sampler=sampler, calls=calls, images=n, frechet=round(frechet(images, real, f'fashion-mnist-{n}'), 2)))
        print(rows[-1], flush=True)
        with open(FILE, 'w', newline='') as f:
            w = csv.DictWriter(f, rows[0].keys(), lineterminator='\n')
            w.writeheader()
            w.writerows(rows)

if __name__=='__main__':
    if sys.argv[1:]==['--table']: table()
    else:
        a, b = (torch.from_numpy(np.load(f)['arr_0']).permute(0, 3, 1, 2) for f in sys.argv[1:3])
        print(f'{frechet(a, b):.2f}')
