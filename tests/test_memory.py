"Memory: a step of DiT-S/4 stays small, and a long run stays flat."
import os
import pytest
from conftest import python

PEAK_STEPS = int(os.environ.get('PEAK_STEPS', 15))      # the figure in the README is that of 50, which takes a minute or two
STEPS = '''
import resource, torch
from mixmix_nb.models import DiT_models
from mixmix_nb.diffusion import Diffusion
from mixmix_nb.data import MemoryData
from mixmix_nb.training import Trainer
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20       # GiB
rss = lambda: int(open('/proc/self/statm').read().split()[1])*resource.getpagesize()/2**20     # MiB
def trainer(name, size, channels, batch, classes, learn_sigma):
    data = MemoryData(torch.randint(0, 256, (batch*4, channels, size, size), dtype=torch.uint8), torch.arange(batch*4)%classes, [str(i) for i in range(classes)])
    model = DiT_models[name](input_size=size, in_channels=channels, num_classes=classes, learn_sigma=learn_sigma)
    return Trainer(model, Diffusion(variance='learned_range' if learn_sigma else 'fixed_large'), data, batch=batch, steps=10**6)
def steps(t, n):
    for x,y,_ in t.data.batches(0, t.batch, t.step_no, t.step_no+n): t.train_step(x, y)
'''

@pytest.mark.timeout(600)
def test_peak_of_s4(say):
    "Some steps of DiT-S/4 on 32×32×4, batch 8, fp32: at most 1.6 GiB for the whole process."
    r = python('-c', STEPS+f"t = trainer('DiT-S/4', 32, 4, 8, 1000, True); steps(t, {PEAK_STEPS}); print(peak())", timeout=500)
    assert r.returncode==0, r.stderr
    say(f'peak of {PEAK_STEPS} steps of DiT-S/4, batch 8: {float(r.stdout):.2f} GiB')
    assert float(r.stdout)<=1.6, f'{r.stdout} GiB'

@pytest.mark.timeout(600)
def test_flat_over_1000_steps(say):
    "The small model's process grows by less than 8 MiB from step 100 to step 1,000."
    r = python('-c', STEPS+"t = trainer('DiT-N/4', 8, 1, 4, 10, False); steps(t, 100); a = rss(); steps(t, 900); print(rss()-a)", timeout=500,
               MALLOC_ARENA_MAX='1', MALLOC_TRIM_THRESHOLD_='131072')       # without it freed memory comes and goes by 10 MiB
    assert r.returncode==0, r.stderr
    say(f'growth of the small model from step 100 to 1,000: {float(r.stdout):.1f} MiB')
    assert float(r.stdout)<8, f'{r.stdout} MiB'
