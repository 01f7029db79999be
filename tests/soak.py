"""One long run on two processes, killed again and again at random moments, against the same run left alone.

    python tests/soak.py [--kills 200] [--torchrun 20] [--seed 0] [--steps 10000] [--folder DIR]

Each life of the run is ended by SIGKILL, SIGTERM or SIGUSR1, sent to both processes or to one of them, at a random moment: while it starts, in a step, while a checkpoint
or the metrics are written, or while it is stopping already. After each death every checkpoint is read and its checksums are compared; then the run goes on with `--resume auto`.
At the end weights, average, optimizer, meter and the lines of metrics.csv must be those of the run that was left alone, to the last bit.

`--torchrun` of the lives are started by torchrun. The others are forked from a process that has imported everything already, which saves ten seconds each; a process of
its own keeps their store, as torchrun would. Not part of the tests: it takes a while. `tests/soak.log` is what it said last.
"""
import argparse, collections, csv, os, platform, random, shutil, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', HF_HUB_OFFLINE='1', MIXMIX_TIMEOUT='60')
import torch, torch.distributed as dist, mixmix_nb.distributed, mixmix_nb.train as mt, mixmix_nb.training as tr, mixmix_nb.data, mixmix_nb.models, mixmix_nb.diffusion, mixmix_nb.speed, mixmix_nb.latents
from test_resume import same

LIMIT = 75      # seconds: one who is killed before the ranks have met is waited for as long as MIXMIX_TIMEOUT says; torchrun would notice it at once

def options(a): return f'--model DiT-N/8 --global-batch-size 34 --steps {a.steps} --ckpt-every 97 --keep-ckpts 3 --log-every 53 --num-sample-images 0 --lr 1e-3 --val-fraction 0.05'.split()

class Forked:
    "A life of the run: two ranks and the keeper of their store, forked from this process."
    def __init__(self, folder, args):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); self.port = s.getsockname()[1]
        self.keeper = self.fork(folder, self.keep)
        self.ranks = [self.fork(folder, lambda r=r: self.train(r, args)) for r in range(2)]
        self.status = {}
    def fork(self, folder, f):
        pid = os.fork()
        if pid: return pid
        try:
            os.chdir(folder)
            out = os.open('out.txt', os.O_WRONLY|os.O_CREAT|os.O_APPEND)
            os.dup2(out, 1); os.dup2(out, 2)
            f(); os._exit(0)
        except SystemExit as e: os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
    def keep(self):
        store = dist.TCPStore('127.0.0.1', self.port, is_master=True, wait_for_workers=False)
        while True: time.sleep(60)
    def train(self, r, args):
        os.environ |= {k: str(v) for k,v in dict(RANK=r, LOCAL_RANK=r, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=self.port, TORCHELASTIC_USE_AGENT_STORE='True').items()}
        mt.main(args)
    def poll(self):
        for p in self.ranks:
            if p not in self.status:
                pid, s = os.waitpid(p, os.WNOHANG)
                if pid: self.status[p] = os.waitstatus_to_exitcode(s)
        return len(self.status)==2
    def end(self):
        for p in (*(p for p in self.ranks if p not in self.status), self.keeper):
            os.kill(p, signal.SIGKILL); os.waitpid(p, 0)

class Launched:
    "A life of the run, started by torchrun."
    def __init__(self, folder, args):
        self.out = open(folder/'out.txt', 'a')
        cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'mixmix_nb.train', *args]
        self.p, self.ranks = subprocess.Popen(cmd, cwd=folder, stdout=self.out, stderr=self.out), []
        while len(self.ranks)<2 and self.p.poll() is None:
            time.sleep(.05)
            text = Path(f'/proc/{self.p.pid}/task/{self.p.pid}/children').read_text()
            self.ranks = [int(c) for c in text.split() if b'mixmix_nb.train' in Path(f'/proc/{c}/cmdline').read_bytes().split(b'\0')]
    def poll(self): return self.p.poll() is not None
    def end(self):
        for p in self.ranks:
            try: os.kill(p, signal.SIGKILL)
            except ProcessLookupError: pass
        self.p.kill(); self.p.wait(); self.out.close()

def wait(life, seconds):
    t = time.monotonic()
    while not life.poll():
        if time.monotonic()-t>seconds: return None
        time.sleep(.005)
    return time.monotonic()-t

def run_of(folder):
    runs = sorted(folder.glob('results/*'))
    assert len(runs)<=1, f'one run, one folder: {runs}'
    return runs[0] if runs else None

def read_all(folder):
    "Every checkpoint is whole; the step of the newest."
    run = run_of(folder)
    return max((tr.read_checkpoint(f)['train_steps'] for f in (run/'checkpoints').glob('*.pt')), default=0) if run else 0

def result(folder):
    run = run_of(folder)
    assert not list(run.rglob('*.tmp')), 'leftovers of torn files'
    return tr.read_checkpoint(run/'checkpoints'/'final.pt'), list(csv.DictReader((run/'metrics.csv').open()))

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for k,v in dict(kills=200, torchrun=20, seed=0, steps=10000).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--folder')
    a = p.parse_args()
    home = Path(a.folder or tempfile.mkdtemp()); rng, begun = random.Random(a.seed), time.monotonic()
    alone, soak = home/'alone', home/'soak'
    for d in (alone, soak): shutil.rmtree(d, ignore_errors=True); d.mkdir(parents=True)
    print(f'{time.strftime("%Y-%m-%d %H:%M")}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; python tests/soak.py --kills {a.kills} --torchrun {a.torchrun} --seed {a.seed} --steps {a.steps}', flush=True)
    # the run left alone
    life = Forked(alone, options(a)); t = wait(life, 3600)
    life.end(); want, want_rows = result(alone)
    pace = t/a.steps
    print(f'left alone: {a.steps} steps in {t:.0f} s', flush=True)
    by_agent = set(rng.sample(range(a.kills), min(a.torchrun, a.kills)))
    counts, slowest, k, redone = collections.Counter(), 0, 0, 0
    while k<a.kills:
        before = read_all(soak)
        life = (Launched if k in by_agent else Forked)(soak, [*options(a), '--resume', 'auto'])
        name, who = rng.choice(['SIGKILL','SIGKILL','SIGTERM','SIGUSR1']), rng.choice(['both', 'rank 0', 'rank 1'])
        # so much time that all kills fit into the run, and the start is hit as well
        left = pace*(a.steps-before)                                    # seconds of training
        moment = min(.9*left, rng.random()*(10 if k in by_agent else 1.6*(left/(a.kills-k)+.6)))
        if wait(life, moment) is not None:                              # it ended by itself: finished?
            life.end()
            assert not (run_of(soak)/'checkpoints'/'final.pt').exists(), f'the run has finished after {k} kills; give more --steps'
            raise SystemExit(f'life {k} ended by itself; see {soak}/out.txt')
        n = int(getattr(signal, name))
        for r in life.ranks if who=='both' else [life.ranks[int(who[-1])]]:
            try: os.kill(r, n)
            except ProcessLookupError: pass
        ended = wait(life, LIMIT)
        status = sorted(life.status.values()) if isinstance(life, Forked) else life.p.returncode
        life.end()
        assert ended is not None, f'life {k} ({name} to {who} after {moment:.2f} s) has not ended within {LIMIT} s'
        now, k = read_all(soak), k+1
        slowest = max(slowest, ended); counts[f'{name} to {who}{" (torchrun)" if isinstance(life, Launched) else ""}'] += 1
        print(f'{k:3d}  {name} to {who:6s} after {moment:5.2f} s, ended {ended:4.1f} s later, status {status}; newest checkpoint {before} → {now}', flush=True)
    life = Forked(soak, [*options(a), '--resume', 'auto']); assert wait(life, 3600) is not None; life.end()
    got, rows = result(soak)
    for key in ('model', 'ema', 'opt', 'meter', 'train_steps', 'epoch'): same(got[key], want[key], key)
    assert len(rows)==len(want_rows)
    for x,y in zip(rows, want_rows): assert all(x[c]==y[c] for c in ('step', 'epoch', 'images', 'loss', 'mse', 'grad_norm', 'lr', 'skipped', 'val_loss')), (x, y)
    for c,v in sorted(counts.items()): print(f'{v:4d}  {c}')
    print(f'{k} kills; slowest end {slowest:.1f} s after the signal; all checkpoints whole after each; {len(rows)} lines of metrics, weights, average, optimizer and meter those of the run left alone, to the last bit; {(time.monotonic()-begun)/60:.0f} min')

if __name__=='__main__': main()
