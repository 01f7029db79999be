"torch.compile as the trainer uses it, with the real compiler: the weights of the eager run, one graph, and nothing compiled anew."
import os, shutil
import pytest
from conftest import python

CODE = '''
import json, sys, torch
from mixmix_nb.data import load_digits
from mixmix_nb.diffusion import Diffusion, cosine_betas
from mixmix_nb.models import DiT
from mixmix_nb.speed import faster
from mixmix_nb.training import Trainer
torch.set_num_threads(1)
data = load_digits()
def trainer(compiled, accumulate):
    torch.manual_seed(0)
    wrap = lambda m: faster(m, torch.device('cpu'), compiled=compiled)
    return Trainer(DiT(8, 4, 1, 32, 1, 2, num_classes=10, learn_sigma=False), Diffusion(cosine_betas(), 'v', 'fixed_large'), data, 16, 12, lr=1e-4, accumulate=accumulate, wrap=wrap)
def go(t, stop):
    for x,y,_ in data.batches(0, 16, t.step_no, stop): t.train_step(x, y)
    return t
from torch._dynamo.utils import counters
accumulate = int(sys.argv[1])
t = go(trainer(True, accumulate), 1)                            # compiled in its first step
graphs = counters['stats']['unique_graphs']
with torch.compiler.set_stance('fail_on_recompile'):
    go(t, 8); t.preview(4, '3'); t.validate(data.subset(torch.arange(40))); go(t, 12)       # looking does not touch it either
one = go(trainer(False, accumulate), 12)
gap = max((a-b).abs().max().item() for a,b in zip(t.params+t.ema_params, one.params+one.ema_params))
print(json.dumps(dict(gap=gap, graphs=graphs, later=counters['stats']['unique_graphs'], breaks=sum(counters['graph_break'].values()))))
'''

@pytest.mark.skipif(not (shutil.which(os.environ.get('CXX', 'g++')) or shutil.which('clang++')), reason='no C++ compiler for torch.compile')
@pytest.mark.parametrize('accumulate', [2])
def test_compiled_step(tmp_path, accumulate, say):
    import json
    r = python('-c', CODE, accumulate, cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path/'cache'))
    assert r.returncode==0, r.stderr[-3000:]
    found = json.loads(r.stdout.splitlines()[-1])
    say(f'12 compiled steps in {accumulate} parts, inductor on the CPU: {found["gap"]:.0e} from the eager ones, {found["graphs"]} graph')
    assert found['gap']<1e-6 and found['graphs']==found['later']==1 and not found['breaks'], found
