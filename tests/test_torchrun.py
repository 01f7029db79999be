"The training command under torchrun: a signal to torchrun stops all, and any number of processes goes on."
import os, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from conftest import ROOT, child_env, forked, side_by_side

RUN = '--model DiT-N/8 --lr 1e-3 --global-batch-size 32 --steps 24 --ckpt-every 6 --keep-ckpts 2 --log-every 5 --num-sample-images 0 --resume auto'.split()

def torchrun(folder, n, *options, **env):
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', *options, '-m', 'mixmix_nb.train', *RUN]
    return subprocess.Popen(cmd, cwd=folder, env=child_env(OMP_NUM_THREADS='1', MIXMIX_TIMEOUT='30', **env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def read_until(p, text):
    said = []
    for line in p.stdout:
        said.append(line)
        if text in line: return ''.join(said)
    raise AssertionError(f'{text!r} was not said:\n{"".join(said)}')

def ranks(p):
    "The pids of the processes that torchrun has started."
    found = [int(c) for c in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split() if b'mixmix_nb.train' in Path(f'/proc/{c}/cmdline').read_bytes().split(b'\0')]
    env = lambda c: dict(v.split('=', 1) for v in Path(f'/proc/{c}/environ').read_text().split('\0') if '=' in v)
    return {int(env(c)['RANK']): c for c in found}

def final(folder):
    run, = (folder/'results').iterdir()
    assert not list(run.rglob('*.tmp'))
    return torch.load(run/'checkpoints'/'final.pt', weights_only=True)

def gap(a, b): return max((a[k][n]-b[k][n]).abs().max().item() for k in ('model', 'ema') for n in a[k])

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    d = tmp_path_factory.mktemp('alone')
    r = forked('-m', 'mixmix_nb.train', *RUN, cwd=d)
    assert r.returncode==0, r.stderr
    return final(d)

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='no /proc to find the ranks in')
def test_a_signal_to_torchrun_stops_all_and_others_go_on(alone, waiting, tmp_path, say):
    "SIGUSR1 to the agent, passed on: one checkpoint, one step; then four processes that share the model go on to the end."
    p = torchrun(tmp_path, 2, '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1', '--shutdown-timeout=60', PYTHONPATH=f'{waiting}:{ROOT}', WAITS='1')
    read_until(p, ' waits')
    p.send_signal(signal.SIGUSR1)
    out, _ = p.communicate(timeout=90)
    assert 'stopped by SIGUSR1 at step' in out and out.count('stopped by')==1, out[-3000:]
    step = int(out.split('stopped by SIGUSR1 at step ')[1].split()[0])
    assert (tmp_path/'results'/'000-DiT-N-8'/'checkpoints'/f'{step:07d}.pt').exists()
    out = side_by_side(4, '-m', 'mixmix_nb.train', *RUN, '--shard', cwd=tmp_path)[0].stdout
    assert f'4 processes that share one model, from step {step}' in out and 'last bit' in out, out[-3000:]
    g = gap(final(tmp_path), alone)
    say(f'stopped on 2 processes at step {step}, ended on 4 that share the model: {g:.0e} from one process')
    assert g<1e-6
