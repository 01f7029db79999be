"A step of training reads nothing from the device, whatever the options; and no copy to the host hides in it."
import pytest, torch
from torch.overrides import TorchFunctionMode
from mixmix_nb.data import load_digits
from mixmix_nb.diffusion import Diffusion, cosine_betas
from mixmix_nb.models import DiT
from mixmix_nb.training import NoWaiting, StopSignal, Trainer

class NoReading(TorchFunctionMode):
    "On a CPU these are no operations of the dispatcher, and `NoWaiting` does not see them."
    READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__bool__, torch.Tensor.__index__)
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.READS: raise RuntimeError(f'{func.__name__} waits for the device')
        return func(*args, **(kwargs or {}))

class Latents:
    "A set whose samples are drawn from a mean and a spread, as latents are."
    def __init__(self): self.d = load_digits(); self.shape = self.d.shape
    def __len__(self): return len(self.d)
    def batches(self, *args, **kw): return self.d.batches(*args, **kw)
    def to_model(self, x, flip, seed, step, lo):
        from mixmix_nb.latents import posterior_noise
        return x.float()/127.5-1 + .1*posterior_noise(seed, step, lo, lo+len(x), self.shape, x.device)

KINDS = dict(plain={}, learned=dict(prediction='eps', variance='learned_range'), latents=dict(data=Latents), clipped=dict(grad_clip=.1, accumulate=2, flip=True, warmup=3, lr_schedule='cosine'),
             fp16=dict(scaler=True))

def trainer(device='cpu', prediction='v', variance='fixed_large', data=load_digits, scaler=False, **kw):
    model = DiT(8, 4, 1, 32, 2, 2, num_classes=10, learn_sigma=variance!='fixed_large')
    data = data().to(device) if data is load_digits else data()
    return Trainer(model, Diffusion(cosine_betas(), prediction, variance), data, 32, 100, device=device, scaler=torch.amp.GradScaler(device) if scaler else None, **kw)

def steps(t, n):
    for x,y,_ in t.stream(0, StopSignal()):
        t.train_step(x, y)
        if t.step_no>=n: return

@pytest.mark.parametrize('kind', KINDS)
def test_a_step_reads_nothing(kind):
    t = trainer(**KINDS[kind]); steps(t, 2)
    with NoReading(), NoWaiting(): steps(t, 6)
    assert t.step_no==6 and t.read_meter()['skipped']==0

@pytest.mark.parametrize('read', [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item, bool, torch.Tensor.nonzero])
def test_it_would_be_seen(read):
    t = trainer(); plain = t.process.loss
    def loss(*args): out = plain(*args); read(out['loss'].detach().sum()); return out
    t.process.loss = loss
    with pytest.raises(RuntimeError, match='waits for the device'):
        with NoReading(), NoWaiting(): steps(t, 1)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA here')
@pytest.mark.parametrize('kind', KINDS)
def test_under_cuda(kind):
    t = trainer('cuda', **KINDS[kind]); steps(t, 3)
    torch.cuda.set_sync_debug_mode('error')
    try: steps(t, 8)
    finally: torch.cuda.set_sync_debug_mode('default')
