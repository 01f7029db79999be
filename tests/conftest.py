"What the tests share: child processes, and data that is skipped with a reason if it is missing."
import os, socket, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
THREADS = str(max(1, (os.cpu_count() or 2)//2))     # two tests run at a time (setup.cfg)
SMALL = '--model DiT-N/8 --batch-size 12 --num-sample-images 0 --log-every 5 --num-workers 0'.split()

def child_env(**extra): # a dict
    "The environment of a child process: no display, no hub."
    extra = {k: str(v) for k,v in extra.items()}
    return os.environ | dict(OMP_NUM_THREADS=THREADS, MPLBACKEND='Agg', HF_HUB_OFFLINE='1', PYTHONUNBUFFERED='1') | extra

def python(*args, cwd=None, timeout=300, **env): # a CompletedProcess with text
    "Run this Python in a process of its own."
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, timeout=timeout, env=child_env(**env), capture_output=True, text=True)

def train(*args, cwd, timeout=300, **env): # a CompletedProcess that ended well
    "`python -m mixmix_nb.train`, which must succeed."
    r = python('-m', 'mixmix_nb.train', *args, cwd=cwd, timeout=timeout, **env)
    assert r.returncode==0, r.stdout+r.stderr
    return r

def torchrun(n, *args, cwd, timeout=300, **env): # a CompletedProcess
    "`torchrun --nproc_per_node=n` on a free port."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    return python('-m', 'torch.distributed.run', f'--nproc_per_node={n}', '--master_addr=127.0.0.1', f'--master_port={port}', *args,
                  cwd=cwd, timeout=timeout, **dict(OMP_NUM_THREADS=1) | env)

@pytest.fixture
def data_dir(): # a `Path`
    "The folder with data for tests (see CONTRIBUTING.md)."
    d = os.environ.get('MIXMIX_DATA')
    if not d or not Path(d).is_dir(): pytest.skip('MIXMIX_DATA is not set to a folder with data for tests')
    return Path(d).resolve()

@pytest.fixture
def say(request):
    "Print something in the summary at the end of the tests."
    return lambda text: request.node.user_properties.append(('say', text))

# longest first, so that none is alone at the end
SLOW = 'test_main_job', 'test_slurm', 'test_resume', 'test_distributed', 'nbs/08', 'nbs/11', 'nbs/12', 'nbs/06', 'nbs/17', 'test_latents', 'nbs/01', 'nbs/'

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((i for i,s in enumerate(SLOW) if s in item.nodeid), len(SLOW)))

ALLOWED_SKIPS = ROOT/'tests'/'allowed_skips.txt'

def pytest_terminal_summary(terminalreporter, exitstatus, config):
    said = [t for reports in terminalreporter.stats.values() for r in reports if getattr(r, 'when', '')=='call' for k,t in r.user_properties if k=='say']
    if said: terminalreporter.section('what was measured')
    for t in said: terminalreporter.write_line(t)

def pytest_sessionfinish(session):
    "A skip whose reason is not listed in allowed_skips.txt fails the session."
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    if reporter is None or hasattr(session.config, 'workerinput'): return
    allowed = [l.strip() for l in ALLOWED_SKIPS.read_text().splitlines() if l.strip() and not l.startswith('#')]
    for r in reporter.stats.get('skipped', []):
        reason = r.longrepr[2] if isinstance(r.longrepr, tuple) else str(r.longrepr)
        if any(a in reason for a in allowed): continue
        reporter.write_line(f'not an allowed skip: {r.nodeid}: {reason}', red=True)
        session.exitstatus = 1
