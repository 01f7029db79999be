"The number of processes changes nothing but the order of summation."
import os, re, signal, subprocess, sys
import pytest, torch
from conftest import SMALL, child_env, torchrun, train
from test_resume import load

TWENTY = [*SMALL, '--steps', 20, '--lr', '1e-4', '--ckpt-every', 10]
DOUBLE = '''
import sys, torch
torch.set_default_dtype(torch.float64)
from mixmix_nb.config import main
main("train", sys.argv[1:])
'''

def final(folder): return load(next(folder.glob('**/checkpoints/final.pt')))

def distance(a, b): # largest difference of weights and EMA
    d = 0.
    for key in ('model', 'ema'): d = max([d, *((a[key][k]-b[key][k]).abs().max().item() for k in a[key])])
    return d

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    d = tmp_path_factory.mktemp('alone')
    train(*TWENTY, cwd=d)
    return final(d)

@pytest.mark.parametrize('n,extra', [(1, ['--accumulate', 3]), (2, []), (2, ['--shard', '--accumulate', 2]), (4, [])])
def test_processes_agree(alone, tmp_path, n, extra):
    args = [a for a in TWENTY]
    args[args.index('--batch-size')] = '--global-batch-size'
    if n==1: train(*args, *extra, cwd=tmp_path)
    else:
        r = torchrun(n, '-m', 'mixmix_nb.train', *args, *extra, cwd=tmp_path)
        assert r.returncode==0, r.stdout[-2000:]+r.stderr[-3000:]
    assert distance(final(tmp_path), alone)<1e-6

def test_in_double_precision(tmp_path):
    (tmp_path/'double.py').write_text(DOUBLE)
    args = [a for a in TWENTY]
    args[args.index('--batch-size')] = '--global-batch-size'
    found = []
    for n in (1, 2):
        (tmp_path/str(n)).mkdir()
        r = torchrun(n, tmp_path/'double.py', *args, cwd=tmp_path/str(n))
        assert r.returncode==0, r.stderr[-3000:]
        found.append(final(tmp_path/str(n)))
    assert found[0]['model']['blocks.0.mlp.fc1.weight'].dtype==torch.float64
    assert distance(*found)<1e-10

def test_a_rank_dies_and_torchrun_restarts(alone, tmp_path):
    "SIGKILL to one rank ends the group; --max-restarts continues from the newest checkpoint; the result is that of one process."
    killer = tmp_path/'killer.py'
    killer.write_text('''
import os, signal, sys
from mixmix_nb.trainer import Trainer
real = Trainer.train_step
def step(self, *a):
    real(self, *a)
    if self.step==13 and os.environ["RANK"]=="1" and os.environ["TORCHELASTIC_RESTART_COUNT"]=="0": os.kill(os.getpid(), signal.SIGKILL)
Trainer.train_step = step
from mixmix_nb.config import main
main("train", sys.argv[1:])
''')
    args = [a for a in TWENTY]
    args[args.index('--batch-size')] = '--global-batch-size'
    r = torchrun(2, killer, *args, cwd=tmp_path, TORCHELASTIC_ERROR_FILE='')
    assert r.returncode!=0
    assert 'another process of this run died' in r.stdout+r.stderr or 'SIGKILL' in r.stderr or 'Signal 9' in r.stderr
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--max-restarts=1', '--standalone', str(killer), *map(str, args),
                        '--results-dir', 'again'], cwd=tmp_path, env=child_env(OMP_NUM_THREADS=1), capture_output=True, text=True, timeout=300)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-3000:]
    assert 'resumed at step 10' in r.stdout
    assert len(list((tmp_path/'again').iterdir()))==1, 'one run, not two'
    assert distance(final(tmp_path/'again'), alone)<1e-6

def test_all_ranks_stop_at_one_step(tmp_path):
    "A signal to one rank stops all of them after the same step, with a checkpoint from which one process continues."
    args = [*map(str, SMALL), '--steps', '100000', '--ckpt-every', '100000']
    p = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', '-m', 'mixmix_nb.train', *args],
                         cwd=tmp_path, env=child_env(OMP_NUM_THREADS=1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in p.stdout:
        if 'step       5' in line: break
    workers = subprocess.run(['pgrep', '-P', str(p.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers)==2
    os.kill(int(workers[1]), signal.SIGUSR1)
    out, _ = p.communicate(timeout=90)
    assert p.returncode==0, out[-3000:]
    k = int(re.search(r'stopped by .* at step (\d+) of 100000', out)[1])
    run, = (tmp_path/'results').iterdir()
    r = train('--resume', run, '--steps', k+2, '--log-every', 1, cwd=tmp_path)
    assert f'resumed at step {k}' in r.stdout and f'step {k+2:7d}/{k+2}' in r.stdout
