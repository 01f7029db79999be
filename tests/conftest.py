"What all tests share: an environment for child processes, and data that is skipped with a reason where it is missing."
import os, socket, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
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

def side_by_side(n, # processes
                 *args, # arguments of the interpreter
                 timeout=120, # seconds
                 **kw): # a list of n `CompletedProcess`
    "A command on `n` forked processes that end well, with the environment that torchrun would give them."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    def go(rank):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=port, OMP_NUM_THREADS=1)
        return forked(*args, timeout=timeout, **{k: str(v) for k,v in env.items()} | kw)
    with ThreadPoolExecutor(n) as pool: done = list(pool.map(go, range(n)))
    for r in done: assert r.returncode==0, r.stderr[-3000:]
    return done

def pytest_configure(config):
    if hasattr(config, 'workerinput') or sys.platform!='linux': return            # one server for all workers
    config.forked = server.Server(child_env())
    os.environ['MIXMIX_FORKED'] = config.forked.path

def pytest_unconfigure(config):
    if hasattr(config, 'forked'): config.forked.close(); os.environ.pop('MIXMIX_FORKED')

# of the longest tests, roughly, on two busy cores; a name is a part of a test's
SECONDS = {'test_main_job': 350, 'test_slurm': 190, 'test_latents': 130, 'test_distributed': 120, 'test_resume.py': 100, 'nbs/12': 88, 'nbs/09': 88, 'test_speed': 80, 'nbs/08': 73,
           'nbs/10': 58, 'nbs/07': 50, 'nbs/02': 40, 'nbs/11': 40, 'test_interrupted.py::test_all': 40, 'nbs/13': 36, 'test_torchrun': 35, 'test_coco': 33, 'test_folder': 30, 'test_memory': 30,
           'nbs/01': 30, 'nbs/06': 26, 'test_commands.py::test_sample_d': 25, 'nbs/05': 20, 'test_forked': 18, 'solutions/13': 15, 'test_repo': 15, 'test_commands.py::test_s': 9, 'nbs/': 7}
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

# The trainer, made to wait: after five steps of each of the first WAITS starts of a job it says so, and goes on when it is asked to stop;
# and each step takes SLOW seconds longer. So a test knows where a run stands when the signal comes, however fast the machine is, and some steps are enough.
WAITING = '''
import os, time
from mixmix_nb import training as tr
def made_to_wait(start=int(os.environ.get('SLURM_RESTART_COUNT', 0)), done=0, stop=None):
    step, enter = tr.Trainer.train_step, tr.StopSignal.__enter__
    def entered(self): nonlocal stop; stop = self; return enter(self)
    def stepped(self, *args):
        nonlocal done
        step(self, *args); done += 1; time.sleep(float(os.environ.get('SLOW', 0)))
        if done!=5 or start>=int(os.environ.get('WAITS', 0)): return
        print(f'start {start}, rank {os.environ.get("RANK", 0)} on node {os.environ.get("SLURM_NODEID", 0)} waits', flush=True)
        while not stop.asked(): time.sleep(.05)
    tr.Trainer.train_step, tr.StopSignal.__enter__ = stepped, entered
if __name__=='__main__': made_to_wait()
exec(compile(open(FILE).read(), FILE, 'exec'))
'''

@pytest.fixture(scope='session')
def waiting(tmp_path_factory):
    "A folder for PYTHONPATH: there `mixmix_nb.train` waits, and all else is what it was."
    d = tmp_path_factory.mktemp('waiting')
    (d/'mixmix_nb').mkdir()
    (d/'mixmix_nb'/'__init__.py').write_text(f'__path__.append({str(ROOT/"mixmix_nb")!r})\n'+(ROOT/'mixmix_nb'/'__init__.py').read_text())
    (d/'mixmix_nb'/'train.py').write_text(f'FILE = {str(ROOT/"mixmix_nb"/"train.py")!r}'+WAITING)
    return d

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
