"A run that is killed again and again ends as the undisturbed one, bit for bit."
import csv, subprocess, sys
from pathlib import Path
import pytest, torch
from conftest import child_env, forked, python

HERE = Path(__file__).parent
STEPS = 120
# 1,797 digits and 50 a step: no checkpoint and no kill falls on the end of an epoch
RUN = f'--model DiT-N/8 --steps {STEPS} --batch-size 50 --ckpt-every 8 --log-every 5 --num-sample-images 0 --lr 1e-3 --val-fraction 0.05'.split()
STEP_KILLS = [f'step:{n}' for n in (3, 9, 10, 13, 7, 12, 11, 6, 17, 14, 15, 5)]
# the first is before there is a run to go on with, the last in the last file
WRITE_KILLS_1 = ['config:before', 'bytes:0.0', 'bytes:0.9', 'flush:before', 'rename:before', 'folder:before', 'final:bytes:0.5']
WRITE_KILLS_2 = ['bytes:0.5', 'metrics', 'flush:after', 'rename:after', 'folder:after', 'final:rename:before']

def same(a, b, where=''):
    "Equal to the last bit, all the way down."
    if isinstance(a, torch.Tensor): assert a.dtype==b.dtype and torch.equal(a, b), f'{where} differs'
    elif isinstance(a, dict):
        assert a.keys()==b.keys(), f'{where} has other keys'
        for k in a: same(a[k], b[k], f'{where}.{k}')
    else: assert a==b, f'{where}: {a} against {b}'

def load(results):
    runs = [d for d in results.iterdir() if (d/'config.json').exists()]       # a folder without one never became a run
    assert len(runs)==1, f'one run, one folder: {runs}'
    run = runs[0]
    assert not list(run.rglob('*.tmp')), 'leftovers of torn files'
    rows = list(csv.DictReader((run/'metrics.csv').open()))
    return torch.load(run/'checkpoints'/'final.pt', weights_only=True), rows

def chain(folder, points):
    "Kill the run at each point in turn, resume each time; returns the points that were hit and where the run stood."
    r = forked(HERE/'killed.py', *points, '--', *RUN, '--resume', 'auto', cwd=folder)
    assert r.returncode==0, f'{r.stdout[-500:]} {r.stderr[-500:]}'
    hits = [l[4:] for l in r.stdout.splitlines() if l.startswith('hit ')]
    assert [h.split()[0] for h in hits]==points
    r = forked('-m', 'mixmix_nb.train', *RUN, '--resume', 'auto', cwd=folder)
    assert r.returncode==0, r.stderr
    return hits

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    d = tmp_path_factory.mktemp('whole')
    r = python('-m', 'mixmix_nb.train', *RUN, cwd=d)
    assert r.returncode==0, r.stderr
    return load(d/'results')

@pytest.mark.parametrize('points', [STEP_KILLS[:6], WRITE_KILLS_1, STEP_KILLS[6:], WRITE_KILLS_2], ids=['steps-1', 'writing-1', 'steps-2', 'writing-2'])
def test_killed_and_resumed(points, undisturbed, tmp_path, say):
    hits = chain(tmp_path, points)
    say('killed at '+', '.join(hits))
    ckpt, rows = load(tmp_path/'results')
    whole, whole_rows = undisturbed
    for k in ('model', 'ema', 'opt', 'meter', 'train_steps', 'epoch'): same(ckpt[k], whole[k], k)
    for a,b in zip(rows, whole_rows, strict=True):
        assert all(a[k]==b[k] for k in ('step', 'epoch', 'images', 'loss', 'mse', 'grad_norm', 'lr', 'skipped', 'val_loss')), (a, b)

def test_a_held_run_is_not_taken(tmp_path):
    "Two processes with --resume auto: the second leaves the first one's folder alone."
    args = ['-m', 'mixmix_nb.train', '--resume', 'auto', '--num-sample-images', '0', '--batch-size', '16', '--model', 'DiT-N/8']
    first = subprocess.Popen([sys.executable, *args, '--steps', '1000000', '--log-every', '1'], cwd=tmp_path, env=child_env(), stdout=subprocess.PIPE, text=True)
    try:
        for line in first.stdout:
            if 'step' in line and 'loss' in line: break
        r = forked(*args, '--steps', '2', cwd=tmp_path)
        assert r.returncode==0, r.stderr
        assert sorted(d.name for d in (tmp_path/'results').iterdir())==['000-DiT-N-8', '001-DiT-N-8']
    finally: first.kill(); first.wait()
