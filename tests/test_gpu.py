"What only a GPU can show. Skipped without one; `tests/gpu.sh` runs it there."
from functools import partial
import pytest, torch
from conftest import torchrun, train
from mixmix_nb.config import Config
from mixmix_nb.data import TensorData
from mixmix_nb.images import DataInfo
from mixmix_nb.dit import make_model
from mixmix_nb.likelihood import ddpm_objective
from mixmix_nb.speed import make_scaler, with_autocast, wrap_for_training
from mixmix_nb.trainer import SingleProcess, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
DIGITS = '--steps 30 --num-sample-images 0 --log-every 10'.split()

def make_trainer(precision='no', compiled=False):
    torch.manual_seed(0)
    device = torch.device('cuda')
    x = torch.randint(0, 256, (32, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = TensorData(x, torch.arange(32), DataInfo('random', (4, 32, 32))).to(device)
    return Trainer(make_model('DiT-T/4'), ddpm_objective(Config()), data, batch=32, lr=1e-3, device=device,
                   scaler=make_scaler(precision, device), wrap=partial(wrap_for_training, compiled=compiled),
                   autocast=partial(with_autocast, precision=precision, device=device))

def losses(trainer, steps=20): # one number per step
    out = []
    for _ in range(steps):
        trainer.train_step(trainer.data.x, trainer.data.cond)
        out.append(trainer.metrics.read(SingleProcess())['loss'])
    return out

@pytest.mark.parametrize('precision', ['no', 'bf16', 'fp16'])
def test_no_step_waits_for_the_device(precision):
    trainer = make_trainer(precision)
    for _ in range(3): trainer.train_step(trainer.data.x, trainer.data.cond)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3): trainer.train_step(trainer.data.x, trainer.data.cond)
    finally: torch.cuda.set_sync_debug_mode('default')

@pytest.mark.parametrize('how', [dict(precision='bf16'), dict(precision='fp16'), dict(compiled=True), dict(precision='bf16', compiled=True)], ids=str)
def test_the_loss_curve_is_that_of_fp32(how):
    plain, other = losses(make_trainer()), [v for v in losses(make_trainer(**how), 40) if v==v]      # fp16 skips its first steps
    assert abs(min(other)-min(plain))<.1*plain[0] and other[-1]<.9*other[0], (plain, other)

@pytest.mark.parametrize('how', [[], ['--shard']], ids=['DDP', 'FSDP'])
def test_one_process_group_on_one_gpu(how, tmp_path):
    r = torchrun(1, '-m', 'mixmix_nb.train', *DIGITS, '--device', 'cuda', *how, cwd=tmp_path)
    assert r.returncode==0, r.stdout+r.stderr

def test_killed_and_resumed_is_the_same_run(tmp_path):
    common = '--device', 'cuda', '--num-sample-images', 0, '--num-workers', 0
    train('--steps', 20, *common, '--results-dir', 'whole', cwd=tmp_path)
    train('--steps', 10, *common, '--results-dir', 'parts', cwd=tmp_path)
    train('--steps', 20, *common, '--results-dir', 'parts', '--resume', 'parts/000-DiT-N-2', cwd=tmp_path)
    a, b = (torch.load(tmp_path/d/'000-DiT-N-2/checkpoints/final.pt', map_location='cpu', weights_only=True) for d in ('whole', 'parts'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
