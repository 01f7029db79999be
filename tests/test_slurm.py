"The batch scripts: their options, and real jobs on a cluster of two nodes on this machine if slurmctld and munged are installed."
import re, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import pytest
from conftest import ROOT, SMALL, child_env, train
from test_distributed import distance
from test_resume import assert_same, load

SCRIPTS = [*sorted((ROOT/'slurm').glob('*.sh')), ROOT/'setup_env.sh', ROOT/'tests'/'slurm_up.sh']
PYTHON = f'{Path(sys.executable).parent}'
RUN = [*map(str, SMALL), '--steps', '40', '--lr', '1e-4']
# training that waits after step 5 of each of the first WAITS starts until it is asked to stop
WAITING = '''
import os, time
from mixmix_nb.runs import StopOnSignal
from mixmix_nb.trainer import Trainer
start, real, done = int(os.environ.get("SLURM_RESTART_COUNT", 0)), Trainer.train_step, 0
def step(self, *a):
    global done
    real(self, *a)
    done += 1
    if done!=5 or start>=int(os.environ.get("WAITS", 0)): return
    print(f"start {start}, rank {os.environ['RANK']} waits", flush=True)
    stop = next(c for c in self.callbacks if isinstance(c, StopOnSignal))
    while not stop.signal: time.sleep(.05)
Trainer.train_step = step
'''

@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script):
    r = subprocess.run(['bash', '-n', script], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    if not shutil.which('shellcheck'): pytest.skip('shellcheck is not installed')
    r = subprocess.run(['shellcheck', '-x', str(script.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode==0, r.stdout

def project(folder): # the folder
    "A folder to submit from, as the repository is one."
    (folder/'logs').mkdir()
    (folder/'slurm').symlink_to(ROOT/'slurm')
    (folder/'waiting.py').write_text(WAITING)
    return folder

def test_options_of_the_script(tmp_path):
    "Settings, environment and arguments, in that order of precedence. Only srun and scontrol are stand-ins."
    (project(tmp_path)/'bin').mkdir()
    for name,text in dict(srun='printf "%s " "$@" > words', scontrol='echo node1').items():
        f = tmp_path/'bin'/name
        f.write_text(f'#!/bin/sh\n{text}\n')
        f.chmod(0o755)
    def words(*args, **env):
        r = subprocess.run(['bash', 'slurm/train.sh', *args], cwd=tmp_path, capture_output=True, text=True,
                           env=child_env(SLURM_JOB_ID=7, PATH=f'{tmp_path/"bin"}:{PYTHON}:/usr/bin:/bin', **env))
        assert r.returncode==0, r.stdout+r.stderr
        return (tmp_path/'words').read_text().split(' train ')[1].split()
    assert words()=='--resume auto --data-path data/coco/imagefolder/train --model DiT-S/4'.split()
    assert words(MODEL='DiT-B/4', EPOCHS=80)[4:]=='--model DiT-B/4 --epochs 80'.split() or words(MODEL='DiT-B/4', EPOCHS=80)[-4:]=='--model DiT-B/4 --epochs 80'.split()
    assert words('--model=DiT-L/2', '--data-path', 'x', '--steps', '5', EPOCHS=80, MODEL='DiT-B/4')=='--resume auto --model=DiT-L/2 --data-path x --steps 5'.split()
    assert words('--resume', 'old.pt')=='--resume old.pt'.split(), 'the checkpoint brings its own data and model'
    assert '--batch-size' not in words('--global-batch-size', '64', BATCH_SIZE=16)

# ---- with SLURM

@pytest.fixture(scope='module')
def cluster():
    "Two nodes; they end with this process, however it ends."
    if not all(map(shutil.which, ('munged', 'slurmctld', 'slurmd', 'sbatch'))): pytest.skip('SLURM is not installed (Debian: slurm-wlm, munge)')
    with tempfile.TemporaryDirectory(prefix='slurm') as d:
        p = subprocess.Popen([ROOT/'tests'/'slurm_up.sh', d], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline().startswith('up'), 'the cluster does not come up; see what tests/slurm_up.sh says'
        yield Path(d)
        p.stdin.close()
        p.wait(60)

class Slurm:
    "What a user does: submit, look, signal."
    def __init__(self, conf, cwd): self.conf, self.cwd, self.jobs = conf, project(cwd), []
    def do(self, *cmd, **env):
        env = child_env(SLURM_CONF=self.conf/'slurm.conf', OMP_NUM_THREADS=1, PYTHONPATH=f'{ROOT}:{self.cwd}', PATH=f'{PYTHON}:/usr/local/bin:/usr/bin:/bin',
                        MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo', **env)
        r = subprocess.run(list(map(str, cmd)), cwd=self.cwd, env=env, capture_output=True, text=True, timeout=60)
        assert r.returncode==0, (cmd, r.stderr)
        return r.stdout
    def submit(self, *args, options=(), script='train', **env):
        job = self.do('sbatch', '--parsable', '--gpus-per-node=0', '--cpus-per-task=1', *options, f'slurm/{script}.sh', *args, **env).strip()
        self.jobs.append(job)
        return job
    def out(self, job): return ''.join(f.read_text() for f in (self.cwd/'logs').glob(f'*_{job}.out'))
    def about(self, job): return dict(p.split('=', 1) for p in self.do('scontrol', 'show', 'job', '--oneliner', job).split() if '=' in p)
    def until(self, job, what, seconds=240):
        "Wait until `what`, a text in its output or a function of `about`, is there."
        end = time.monotonic()+seconds
        while time.monotonic()<end:
            a = self.about(job)
            if what in self.out(job) if isinstance(what, str) else what(a): return a
            if a['JobState'] in ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL'): break
            time.sleep(.2)
        raise AssertionError(f'waited for {what}: {self.about(job)}\n{self.out(job)[-3000:]}')
    def ended(self, job): return self.until(job, lambda a: a['JobState'] in ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL'))
    def final(self):
        run, = (self.cwd/'results').iterdir()
        return load(run/'checkpoints'/'final.pt')

@pytest.fixture
def slurm(cluster, tmp_path):
    s = Slurm(cluster, tmp_path)
    yield s
    for j in s.jobs: subprocess.run(['scancel', '--full', j], env=child_env(SLURM_CONF=cluster/'slurm.conf'))

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    d = tmp_path_factory.mktemp('alone')
    train(*RUN, cwd=d, OMP_NUM_THREADS=1)
    return load(next(d.glob('results/*/checkpoints/final.pt')))

def stopped(out): return [int(n) for n in re.findall(r'stopped by .* at step (\d+) of', out)]

def test_preempted_twice_and_bit_identical(slurm, alone, say):
    "SIGUSR1 and SIGTERM to the batch script, as SLURM sends them before the time is up and at preemption."
    job = slurm.submit(*RUN, '--plugin', 'waiting', DATA_PATH='digits', MODEL='DiT-N/8', WAITS=2)
    for start,name in enumerate(('USR1', 'TERM')):
        slurm.until(job, f'start {start}, rank 0 waits')
        slurm.do('scancel', f'--signal={name}', '--batch', job)
    about, out = slurm.ended(job), slurm.out(job)
    assert (about['JobState'], about['Restarts'], about['ExitCode'])==('COMPLETED', '2', '0:0'), out
    assert stopped(out)==[5, 10], out
    assert_same(slurm.final(), alone)
    say('SLURM, one node: stopped at steps 5 and 10, requeued twice, final.pt bit-identical to an undisturbed run')

def test_two_nodes(slurm, alone, say):
    "A run on two nodes, stopped once, is the run of one process to summation order."
    i = RUN.index('--batch-size')
    job = slurm.submit(*RUN[:i], '--global-batch-size', *RUN[i+1:], '--plugin', 'waiting', options=['--nodes=2'], DATA_PATH='digits', MODEL='DiT-N/8', WAITS=1)
    slurm.until(job, 'start 0, rank 0 waits')
    slurm.until(job, 'start 0, rank 1 waits')
    slurm.do('scancel', '--signal=USR1', '--batch', job)
    a, out = slurm.ended(job), slurm.out(job)
    assert (a['JobState'], a['Restarts'])==('COMPLETED', '1') and '2 processes' in out, out
    far = distance(slurm.final(), alone)
    assert far<1e-5, far
    say(f'SLURM, two nodes: stopped at {stopped(out)}, requeued, finished; largest difference to one process {far:.0e}')

def test_failure_and_cancellation_end_the_job(slurm):
    "A wrong option: status 2, one start. A job that its owner cancels does not come back."
    bad = slurm.submit(*RUN, '--lr', '-1', DATA_PATH='digits')
    long = slurm.submit(*RUN, '--steps', '1000000', '--plugin', 'waiting', DATA_PATH='digits', MODEL='DiT-N/8', WAITS=1)
    a = slurm.ended(bad)
    assert (a['JobState'], a['ExitCode'], a['Restarts'])==('FAILED', '2:0', '0') and '--lr must be at least' in slurm.out(bad)
    slurm.until(long, 'waits')
    slurm.do('scancel', long)
    slurm.until(long, lambda a: a['JobState']=='CANCELLED')
    time.sleep(1)
    a = slurm.about(long)
    assert (a['JobState'], a['Restarts'])==('CANCELLED', '0')
