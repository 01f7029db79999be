"""One long run on two processes, killed again and again at random moments, against the same run left alone.

    python tests/soak.py [--kills 200] [--torchrun 20] [--steps 5000] [--seed 0] [--folder DIR] [--log tests/soak.log]

Each life of the run is ended by SIGKILL, SIGTERM or SIGUSR1, sent to both processes or to one, at a random moment:
while it starts, in a step, while a checkpoint or the metrics are written, or while it is already stopping. After each,
every checkpoint must be readable; then the run goes on with `--resume auto`. At the end weights, EMA, optimizer, meter
and metrics.csv must be those of the run that was left alone, to the last bit.

`--torchrun` of the lives are started by torchrun. The others are forked from this process, which has imported all
modules already and so saves ten seconds each; a process of its own keeps their store, as torchrun would. Linux only.
"""
import argparse, collections, os, platform, random, shutil, signal, socket, subprocess, sys, tempfile, time, traceback
from pathlib import Path
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', HF_HUB_OFFLINE='1', MIXMIX_TIMEOUT='60')
import torch, torch.distributed, mixmix_nb.config, mixmix_nb.train
from mixmix_nb.checkpoints import read_checkpoint
from test_resume import assert_same, metrics

LIMIT = 75          # seconds: if one is killed before the two have met, the other waits MIXMIX_TIMEOUT
RUN = '--model DiT-N/8 --global-batch-size 34 --ckpt-every 97 --keep-ckpts 3 --log-every 53 --num-sample-images 0 ' \
      '--lr 1e-3 --val-fraction 0.05 --num-workers 0 --device cpu'.split()

class Forked:
    "A life of the run: two ranks and the keeper of their store, forked from this process."
    def __init__(self, folder, args):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.folder, self.ended = folder, {}
        self.keeper = self.fork(self.keep)
        self.ranks = [self.fork(lambda: self.train(r, args)) for r in range(2)]
    def fork(self, f): # id of the process
        pid = os.fork()
        if pid: return pid
        try:
            os.chdir(self.folder)
            out = os.open('out.txt', os.O_WRONLY|os.O_CREAT|os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            f()
        except SystemExit as e: os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException: traceback.print_exc()
        os._exit(1)
    def keep(self):
        store = torch.distributed.TCPStore('127.0.0.1', self.port, is_master=True, wait_for_workers=False)
        while store: time.sleep(60)
    def train(self, r, args):
        env = dict(RANK=r, LOCAL_RANK=r, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR='127.0.0.1',
                   MASTER_PORT=self.port, TORCHELASTIC_USE_AGENT_STORE='True')
        os.environ |= {k: str(v) for k,v in env.items()}
        mixmix_nb.config.main('train', args)
    def poll(self): # have both ended?
        for p in self.ranks:
            if p in self.ended: continue
            pid, status = os.waitpid(p, os.WNOHANG)
            if pid: self.ended[p] = os.waitstatus_to_exitcode(status)
        return len(self.ended)==2
    def end(self): # exit statuses
        for p in (*(p for p in self.ranks if p not in self.ended), self.keeper):
            os.kill(p, signal.SIGKILL)
            os.waitpid(p, 0)
        return sorted(self.ended.values())

class Launched:
    "A life of the run, started by torchrun."
    def __init__(self, folder, args):
        command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'mixmix_nb.train', *args]
        with open(folder/'out.txt', 'a') as out:
            self.process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=out, stderr=out)
        self.ranks, pid = [], self.process.pid
        while len(self.ranks)<2 and not self.poll():
            time.sleep(.05)
            children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
            self.ranks = [int(c) for c in children if b'mixmix_nb.train' in Path(f'/proc/{c}/cmdline').read_bytes()]
    def poll(self): return self.process.poll() is not None
    def end(self):
        for p in self.ranks: send(p, signal.SIGKILL)
        self.process.kill()
        return self.process.wait()

def send(pid, number):
    try: os.kill(pid, number)
    except ProcessLookupError: pass

def wait(life, seconds): # how long it took to end, or None
    start = time.monotonic()
    while not life.poll():
        if time.monotonic()-start>seconds: return None
        time.sleep(.005)
    return time.monotonic()-start

def run_of(folder): # its only run, or None
    runs = list(folder.glob('results/*'))
    assert len(runs)<=1, f'one run, one folder: {runs}'
    return runs[0] if runs else None

def newest(folder): # step of the newest checkpoint; raises if one cannot be read
    run = run_of(folder)
    return max([0, *(read_checkpoint(f)['train_steps'] for f in (run/'checkpoints').glob('*.pt'))]) if run else 0

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for name,default in dict(kills=200, torchrun=20, steps=5000, seed=0).items():
    parser.add_argument(f'--{name}', type=int, default=default)
parser.add_argument('--folder', help='where to run (default: a temporary folder, removed if all is well)')
parser.add_argument('--log', default=str(Path(__file__).with_suffix('.log')), help='file that is replaced')
a = parser.parse_args()
home, rng, begun = Path(a.folder or tempfile.mkdtemp()), random.Random(a.seed), time.monotonic()
args, log = [*RUN, '--steps', str(a.steps)], open(a.log, 'w')
alone, soak = home/'alone', home/'soak'
for d in (alone, soak):
    shutil.rmtree(d, ignore_errors=True)
    d.mkdir(parents=True)

def say(line): print(line, flush=True), print(line, file=log, flush=True)

say(f'{time.strftime("%F %H:%M")}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; '
    f'python tests/soak.py --kills {a.kills} --torchrun {a.torchrun} --steps {a.steps} --seed {a.seed}')
life = Forked(alone, args)
pace = wait(life, 7200)/a.steps
assert life.end()==[0, 0], (alone/'out.txt').read_text()[-2000:]
say(f'left alone: {a.steps} steps in {pace*a.steps:.0f} s')
by_torchrun, counts, slowest = rng.sample(range(a.kills), min(a.torchrun, a.kills)), collections.Counter(), 0
for k in range(a.kills):
    before, kind = newest(soak), Launched if k in by_torchrun else Forked
    life = kind(soak, [*args, '--resume', 'auto'])
    name, who = rng.choice(['SIGKILL', 'SIGKILL', 'SIGTERM', 'SIGUSR1']), rng.choice(['both', 'rank 0', 'rank 1'])
    left = pace*(a.steps-before)                    # seconds of training; all kills must fit in, and some hit the start
    moment = min(.6*left, rng.random()*(10 if kind is Launched else 1.6*(left/(a.kills-k)+.6)))
    if wait(life, moment) is not None:
        raise SystemExit(f'life {k} ended by itself, {life.end()}: give more --steps, or see {soak/"out.txt"}')
    for p in life.ranks if who=='both' else [life.ranks[int(who[-1])]]: send(p, getattr(signal, name))
    seconds = wait(life, LIMIT)
    status = life.end()
    assert seconds is not None, f'life {k} ({name} to {who} after {moment:.2f} s) has not ended within {LIMIT} s'
    slowest = max(slowest, seconds)
    counts[f'{name} to {who}{" (torchrun)" if kind is Launched else ""}'] += 1
    say(f'{k+1:3d}  {name} to {who:6s} after {moment:5.2f} s, ended {seconds:4.1f} s later, status {status}; '
        f'newest checkpoint {before} → {newest(soak)}')
life = Forked(soak, [*args, '--resume', 'auto'])
assert wait(life, 7200) is not None and life.end()==[0, 0], (soak/'out.txt').read_text()[-2000:]
run, want = run_of(soak), run_of(alone)
assert not list(run.rglob('*.tmp')), 'remains of torn files'
got, undisturbed = (read_checkpoint(r/'checkpoints'/'final.pt') for r in (run, want))
assert_same(got, undisturbed, ('model', 'ema', 'opt', 'meter', 'train_steps'))
assert metrics(run)==metrics(want)
for name,n in sorted(counts.items()): say(f'{n:4d}  {name}')
say(f'{a.kills} kills; slowest end {slowest:.1f} s after the signal; every checkpoint readable after each; weights, '
    f'EMA, optimizer, meter and {len(metrics(run))} rows of metrics.csv are those of the run left alone, to the last '
    f'bit; {(time.monotonic()-begun)/60:.0f} min')
if not a.folder: shutil.rmtree(home)
