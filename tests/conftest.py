"What all tests share: an environment for child processes, and data that is skipped with a reason where it is missing."
import os, subprocess, sys
from pathlib import Path
import pytest
import forked as server

ROOT = Path(__file__).parent.parent
os.environ |= dict(MPLBACKEND='Agg', HF_HUB_OFFLINE='1')       # of this process, for commands that are called in it
THREADS = str(max(1, (os.cpu_count() or 2)//2))     # two tests run at a time (setup.cfg)

def child_env(**extra): # a dict
    "The environment of a child process: so many threads, no display, no network for hubs."
    return os.environ | dict(OMP_NUM_THREADS=THREADS, MPLBACKEND='Agg', HF_HUB_OFFLINE='1', PYTHONUNBUFFERED='1') | extra

def python(*args, # arguments of the interpreter
           cwd=None, # where to run
           timeout=300, # seconds
           **env): # a CompletedProcess with text
    "Run this Python in a process of its own."
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, timeout=timeout, env=child_env(**env), capture_output=True, text=True)

def forked(*args, # arguments of the interpreter
           cwd=None, # where to run
           timeout=300, # seconds
           **env): # a CompletedProcess with text
    "The same, in a process forked from one that has done the imports (see forked.py): for commands of which only what they do is tested."
    path = os.environ.get('MIXMIX_FORKED')
    if not path: return python(*args, cwd=cwd, timeout=timeout, **env)
    return server.run(path, [*map(str, args)], cwd, child_env(**env), timeout)

def pytest_configure(config):
    if hasattr(config, 'workerinput') or sys.platform!='linux': return            # one server for all workers
    config.forked = server.Server(child_env())
    os.environ['MIXMIX_FORKED'] = config.forked.path

def pytest_unconfigure(config):
    if hasattr(config, 'forked'): config.forked.close(); os.environ.pop('MIXMIX_FORKED')

# of the longest tests, roughly, on two busy cores; a name is a part of a test's
SECONDS = {'test_main_job': 200, 'test_latents': 150, 'test_slurm': 130, 'test_distributed': 100, 'test_resume.py': 80, 'test_torchrun': 70, 'test_coco': 60, 'test_peak': 50,
           'nbs/12': 50, 'nbs/08': 40, 'nbs/11': 40, 'nbs/09': 35, 'nbs/10': 30, 'nbs/05': 25, 'nbs/07': 25, 'nbs/02': 25, 'test_folder': 25, 'test_flat': 25, 'nbs/01': 20,
           'test_interrupted.py': 20, 'test_commands.py::test_s': 15, 'test_speed': 15, 'test_repo': 10, 'nbs/': 10, 'test_forked': 9}
TOGETHER = 'test_coco', 'test_distributed', 'test_latents', 'test_repo', 'test_resume', 'test_slurm', 'test_torchrun'       # their tests share what takes long to make

def pytest_collection_modifyitems(items):
    "The longest begin first, so that none is alone at the end."
    items.sort(key=lambda item: -next((s for name,s in SECONDS.items() if name in item.nodeid), 0))

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Tests one by one in this order, and those of some files in one process."
    from xdist.scheduler import LoadScopeScheduling
    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid): return f if Path(f := nodeid.split('::')[0]).stem in TOGETHER else nodeid
    return Scheduling(config, log) if config.getvalue('dist')=='loadscope' else None

@pytest.fixture
def data_dir(): # a `Path`
    "The folder with data for tests (see CONTRIBUTING.md)."
    d = os.environ.get('MIXMIX_DATA')
    if not d or not Path(d).is_dir(): pytest.skip('MIXMIX_DATA is not set to a folder with data for tests')
    return Path(d).resolve()

@pytest.fixture
def say(request):
    "Tell something that stands in the summary at the end of the tests."
    return lambda text: request.node.user_properties.append(('say', text))

def pytest_terminal_summary(terminalreporter):
    said = [t for reports in terminalreporter.stats.values() for r in reports if getattr(r, 'when', '')=='call' for k,t in r.user_properties if k=='say']
    if said: terminalreporter.section('what was seen')
    for t in said: terminalreporter.write_line(t)
