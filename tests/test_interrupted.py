"Ends that nobody plans for: a full disk when a signal asks for a checkpoint, two runs begun at once, all processes killed, one that dies in a new run."
import os, re, resource, signal, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from conftest import ROOT, child_env, forked
from test_torchrun import final, gap, read_until, ranks

RUN = '--model DiT-N/8 --lr 1e-3 --global-batch-size 32 --ckpt-every 6 --log-every 5 --num-sample-images 0'.split()

def train(folder, *options, n=1, agent=(), env={}, **kw):
    "The command, under torchrun for more than one process, in a session of its own."
    how = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', *agent] if n>1 else []
    return subprocess.Popen([sys.executable, *how, '-m', 'mixmix_nb.train', *RUN, *map(str, options)], cwd=folder, env=child_env(OMP_NUM_THREADS='1', MIXMIX_TIMEOUT='30', **env),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **kw)

def test_full_disk_when_a_signal_comes(tmp_path):
    "The checkpoint that the signal asks for cannot be written: status 1, and no invitation to go on from it."
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))     # a file may have so many bytes: less than a checkpoint
    p = train(tmp_path, '--steps', 100_000, '--ckpt-every', 100_000, preexec_fn=small)
    read_until(p, ' loss ')
    p.send_signal(signal.SIGTERM)
    out, _ = p.communicate(timeout=60)
    assert p.returncode==1 and 'go on with' not in out, out[-2000:]
    assert re.search(r'stopped by SIGTERM at step \d+ of 100000, and its checkpoint could not be written \(File too large\)', out), out[-2000:]
    assert not [*tmp_path.rglob('*.pt')] and not [*tmp_path.rglob('*.tmp')]

def test_two_at_once(tmp_path):
    "Two runs that begin at the same moment get two folders."
    with ThreadPoolExecutor(2) as pool: both = [pool.submit(forked, '-m', 'mixmix_nb.train', *RUN, '--steps', 6, cwd=tmp_path) for _ in range(2)]
    for r in both: assert r.result().returncode==0, r.result().stderr[-2000:]
    assert sorted(d.name for d in (tmp_path/'results').iterdir())==['000-DiT-N-8', '001-DiT-N-8']
    assert len([*tmp_path.rglob('final.pt')])==2

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='no /proc to find the ranks in')
def test_all_killed_and_resumed_on_one(waiting, tmp_path, say):
    "A rank that dies in a run without --resume is started again in the same folder; then all are killed, and one process goes on."
    p = train(tmp_path, '--steps', 60, n=2, agent=['--max-restarts=1'], env=dict(PYTHONPATH=f'{waiting}:{ROOT}', SLOW='.05'))  # not over before it is killed
    read_until(p, 'wrote checkpoints/0000006.pt')
    os.kill(ranks(p)[1], signal.SIGKILL)
    again = read_until(p, 'wrote checkpoints/0000024.pt')
    assert ', from step ' in again, again[-3000:]
    for pid in [*ranks(p).values(), p.pid]: os.kill(pid, signal.SIGKILL)
    p.communicate(timeout=60)
    one = lambda folder, *more: forked('-m', 'mixmix_nb.train', *RUN, '--steps', 60, *more, cwd=folder, OMP_NUM_THREADS='1')
    left = one(tmp_path, '--resume', 'auto')
    assert left.returncode==0 and ', from step ' in left.stdout, left.stderr[-3000:]
    alone = tmp_path/'alone'; alone.mkdir()
    r = one(alone)
    assert r.returncode==0, r.stderr[-3000:]
    g = gap(final(tmp_path), final(alone))
    say(f'one of two ranks killed and started again, then all killed, ended on one process: {g:.0e} from one process alone')
    assert g<3e-5                                                           # rounding after 60 steps (chapter 11); a step done twice or left out is 1e-4
