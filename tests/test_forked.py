"A forked command behaves like a plain one: output, status, signals, environment, folder."
import subprocess, sys, time
import pytest, torch
from conftest import forked, python

pytestmark = pytest.mark.skipif(sys.platform!='linux', reason='commands are forked on Linux alone')
SAY = 'import os, sys; print(sys.argv, os.getcwd(), os.environ.get("MARK"), sys.path[0], sys.stdin.read(), sys.stdout.isatty(), __name__); print("no", file=sys.stderr)'
ENDS = {'well': 'print("a", end="")', 'status': 'import sys; print("a"); sys.exit(7)', 'none': 'import sys; sys.exit()', 'minus': 'import sys; sys.exit(-3)', 'text': 'import sys; sys.exit("no")', 'bug': 'print("a"); 1/0',
        'ctrl-c': 'raise KeyboardInterrupt', 'killed': 'import os; print("a", flush=True); os.kill(os.getpid(), 9)', 'sigterm': 'import os; os.kill(os.getpid(), 15)',
        'sigint': 'import os, time; os.kill(os.getpid(), 2); time.sleep(9)', 'atexit': 'import atexit; atexit.register(print, "last"); print("a")',
        'thread': 'import threading, time; threading.Thread(target=lambda: (time.sleep(.2), print("b"))).start(); print("a")',
        'child': 'import subprocess, sys; print(subprocess.call([sys.executable, "-c", "exit(3)"]))'}

def both(*args, **kw): return [f(*args, **kw) for f in (forked, python)]

@pytest.mark.parametrize('code', ENDS.values(), ids=ENDS)
def test_same_end(code):
    a, b = both('-c', code)
    assert (a.returncode, a.stdout)==(b.returncode, b.stdout)
    assert a.stderr.splitlines()[-1:]==b.stderr.splitlines()[-1:]

@pytest.mark.parametrize('how', ['-c', '-m', 'file'])
def test_same_start(how, tmp_path):
    (tmp_path/'say.py').write_text(SAY)
    a, b = both(*{'-c': ['-c', SAY], '-m': ['-m', 'say'], 'file': [tmp_path/'say.py']}[how], '--x', 'y z', cwd=tmp_path, MARK='ü')
    assert a.returncode==b.returncode==0 and 'ü' in a.stdout
    assert (a.stdout, a.stderr)==(b.stdout, b.stderr)

def test_same_training(tmp_path):
    "The command: the same files with the same bits, and no word on stderr."
    runs = []
    for name, f in (('forked', forked), ('plain', python)):
        r = f('-m', 'mixmix_nb.train', '--model', 'DiT-N/8', '--steps', '5', '--log-every', '1', '--num-sample-images', '2', '--sample-steps', '2', '--results-dir', name, cwd=tmp_path)
        assert r.returncode==0 and not r.stderr, r.stderr
        runs.append(torch.load(tmp_path/name/'000-DiT-N-8'/'checkpoints'/'final.pt', weights_only=True))
    assert all(torch.equal(runs[0]['ema'][k], runs[1]['ema'][k]) for k in runs[0]['ema'])
    assert sorted(p.name for p in (tmp_path/'forked').rglob('*'))==sorted(p.name for p in (tmp_path/'plain').rglob('*'))

def test_nothing_is_left_of_another_command():
    assert forked('-c', 'import sys, os; sys.left = os.environ["LEFT"] = "x"; import torch; torch.manual_seed(7)').returncode==0
    ask = 'import sys, os, torch; print(hasattr(sys, "left"), "LEFT" in os.environ, torch.get_num_threads()); print(torch.rand(()), __import__("numpy").random.rand(), __import__("random").random())'
    a, b = (forked('-c', ask, OMP_NUM_THREADS=n).stdout.splitlines() for n in '12')
    assert a[0]=='False False 1' and b[0]=='False False 2'
    assert not set(a[1].split()) & set(b[1].split()), 'the same random numbers twice'

def test_too_long(tmp_path):
    "It is killed with all that it has started."
    code = 'import os, time; pid = os.fork(); print("a", flush=True); time.sleep(2); open("late", "w"); time.sleep(60)'
    with pytest.raises(subprocess.TimeoutExpired) as e: forked('-c', code, cwd=tmp_path, timeout=1)
    assert 'a' in e.value.stdout
    time.sleep(1.5)
    assert not (tmp_path/'late').exists()

def test_what_comes_too_late_is_refused():
    r = forked('-c', '', MALLOC_ARENA_MAX='1', PYTHONUTF8='1')
    assert r.returncode==1 and 'MALLOC_ARENA_MAX, PYTHONUTF8' in r.stderr
