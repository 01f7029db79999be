"The batch scripts: their arguments without SLURM, and real jobs on a cluster of two nodes on this machine where slurmctld and munged are installed."
import os, re, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from conftest import ROOT, child_env
from mixmix_nb.train import main
from test_latents import tiny_model
from test_resume import same

SCRIPTS = [*sorted((ROOT/'slurm').glob('*.sh')), ROOT/'setup_env.sh', ROOT/'tests'/'slurm_up.sh']
SMALL = '--data-path pics --image-size 8 --model DiT-N/8 --batch-size 20 --num-sample-images 0 --num-workers 0 --log-every 20'.split()
HERE_TOO = dict(MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo', TORCHRUN_ARGS='--local-addr=127.0.0.1')     # the names node1, node2 mean nothing here

def bash(*args, cwd, timeout=60, **env):
    return subprocess.run(['bash', *map(str, args)], cwd=cwd, env=child_env(**env), capture_output=True, text=True, timeout=timeout)

def project(folder): # the folder
    "A folder to submit from, as the repository is one."
    (folder/'logs').mkdir()
    (folder/'slurm').symlink_to(ROOT/'slurm')
    return folder

def stub(folder, name, text):
    "A command of our own, found before the real one."
    (folder/'bin').mkdir(exist_ok=True)
    f = folder/'bin'/name
    f.write_text('#!/usr/bin/env bash\n'+text); f.chmod(0o755)

def stub_path(folder): return f'{folder/"bin"}:{Path(sys.executable).parent}:{os.environ["PATH"]}'

# ---- without SLURM

@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script):
    r = subprocess.run(['bash', '-n', script], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    if shutil.which('shellcheck'):
        r = subprocess.run(['shellcheck', '-x', str(script.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True)
        assert r.returncode==0, r.stdout

def test_nobodys_cluster():
    "No account, partition, module or path of anybody's, and SLURM finds a folder for the logs."
    for f in SCRIPTS:
        text = f.read_text()
        assert not re.search(r'^#SBATCH.*(account|partition|qos|mail|constraint)|module load|/(home|scratch|work|Users)/', text, re.M), f
    assert (ROOT/'logs'/'.gitkeep').exists()
    head = (ROOT/'slurm'/'train.sh').read_text()
    for l in ('--output=logs/dit_%j.out', '--open-mode=append', '--requeue', '--signal=B:USR1@120'): assert f'#SBATCH {l}\n' in head

@pytest.fixture
def dry(tmp_path):
    "Run train.sh with commands that only say how they were called."
    project(tmp_path)
    says = 'printf "%s:" "${0##*/}"; printf " %s" "$@"; echo\n'
    stub(tmp_path, 'python', 'case $1 in -c) case $2 in *run.py*) echo "$HELP";; esac; exit 0;; esac\n'+says+'exit ${STATUS:-0}\n')
    stub(tmp_path, 'srun', says)
    stub(tmp_path, 'torchrun', says)
    stub(tmp_path, 'scontrol', 'echo "scontrol: $*" >> calls; case "$1 $2" in "show hostnames") printf "a1\\na2\\n";; show*) printf "JobState=%s Reason=None\\n   StdOut=%s\\n" "$STATE" "$STDOUT";; esac\n')
    def run(*args, **env):
        return bash('slurm/train.sh', *args, cwd=tmp_path, **dict(SLURM_JOB_ID='7', PATH=stub_path(tmp_path)) | env)
    return run

def words(r):
    assert r.returncode==0, r.stdout+r.stderr
    return r.stdout.split()[1:]

def test_settings_environment_arguments(dry):
    base = ['-m', 'mixmix_nb.train']
    assert words(dry())==base+'--data-path data/coco/imagefolder/train --model DiT-S/4 --resume auto'.split()
    assert words(dry(MODEL='DiT-B/4', EPOCHS='80', NUM_CLASSES='80'))==base+'--data-path data/coco/imagefolder/train --model DiT-B/4 --num-classes 80 --epochs 80 --resume auto'.split()
    w = words(dry('--model=DiT-L/2', '--data-path', 'x', '--steps', '5', EPOCHS='80', MODEL='DiT-B/4'))
    assert w==base+'--model=DiT-L/2 --data-path x --steps 5 --resume auto'.split()
    assert '--steps' not in words(dry('--epochs', '3', STEPS='100'))
    assert {'--steps', '--epochs'} & set(words(dry(STEPS='100', EPOCHS='80')))=={'--steps'}
    assert words(dry('--global-batch-size', '64', BATCH_SIZE='16'))[6:]==['--global-batch-size', '64', '--resume', 'auto'], 'they exclude each other'
    assert '--batch-size 16' in ' '.join(words(dry(BATCH_SIZE='16')))

def test_a_checkpoint_to_begin_with(dry, tmp_path):
    "--resume FILE holds for the first start; a requeued job goes on with the run that its log names, wherever that is, once it has a checkpoint."
    again = lambda *a: words(dry(*a, SLURM_RESTART_COUNT='1'))[2:]
    assert words(dry('--resume', 'old.pt'))[2:]==['--resume', 'old.pt'], 'with the data and the model of the checkpoint'
    assert words(dry('--resume=old.pt', MODEL='DiT-B/4'))[2:]==['--model', 'DiT-B/4', '--resume=old.pt']
    assert words(dry('--resume', 'auto'))[2:]==words(dry())[2:]
    assert again('--resume', 'old.pt')==['--resume', 'old.pt'], 'nothing was begun'
    old, new = tmp_path/'else where'/'003-DiT-S-4', tmp_path/'else where'/'004-DiT-S-4'
    for d in (old, new): (d/'checkpoints').mkdir(parents=True)
    begun = ''.join(f'{d}: DiT-S/4, 32,958,368 parameters, 1,797 images of 1×8×8, 10 classes, 9 steps of 20 on cpu\n' for d in (old, new))
    (tmp_path/'logs'/'dit_7.out').write_text(f'said: before\n{begun}step 20/40  loss 0.1\n')
    assert again('--resume', 'old.pt')==['--resume', 'old.pt'], 'no checkpoint yet'
    (new/'checkpoints'/'0000005.pt').touch()
    found = f'--resume auto --results-dir {new.parent}'.split()
    assert again('--resume=old.pt', '--results-dir=x')==['--resume=old.pt', '--results-dir=x', *found]
    (tmp_path/'logs'/'dit_7.out').rename(tmp_path/'of my own.log')
    assert again('--resume', 'old.pt')==['--resume', 'old.pt']
    assert words(dry('--resume', 'old.pt', SLURM_RESTART_COUNT='1', STDOUT=str(tmp_path/'of my own.log')))[4:]==found, 'sbatch --output'
    assert words(dry('--steps', '9', SLURM_RESTART_COUNT='1'))[-4:]==['--steps', '9', '--resume', 'auto']

def test_several_processes(dry):
    old, new = '"--nnodes"', '"--nnodes" "--signals-to-handle" "--shutdown-timeout"'
    w = words(dry(NPROC_PER_NODE='4', SLURM_JOB_NUM_NODES='2', SLURM_JOB_NODELIST='a[1-2]', HELP=new, TORCHRUN_ARGS='--max-restarts=3 --local-addr=x'))
    for a in ('--nodes=2', '--ntasks=2', '--nnodes=2', '--nproc-per-node=4', '--rdzv-backend=c10d', '--rdzv-endpoint=a1:20007', '--rdzv-id=7.0', '--max-restarts=3', '--local-addr=x',
              '--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1'): assert a in w, (a, w)
    assert any(a.startswith('--shutdown-timeout=') for a in w)
    w = words(dry(SLURM_GPUS_ON_NODE='2', SLURM_JOB_NODELIST='a1', HELP=old, MASTER_PORT='1234'))
    assert '--nproc-per-node=2' in w and '--rdzv-endpoint=a1:1234' in w and not any('signals' in a or 'shutdown' in a for a in w)

def calls(folder): return (folder/'calls').read_text() if (folder/'calls').exists() else ''

@pytest.mark.parametrize('state,restarts,said,status,back,code', [
    ('RUNNING', 0, 'stopped', 0, True, 0),
    ('RUNNING', 0, 'stopped', 1, False, 1),             # nobody asked it to stop, and it failed
    ('RUNNING', 0, 'done', 0, False, 0),
    ('RUNNING', 0, 'failed', 2, False, 2),
    ('RUNNING', 0, 'full', 1, False, 1),                # nothing to go on from
    ('COMPLETING', 0, 'stopped', 0, False, 0),          # cancelled by its owner
    ('PENDING', 1, 'stopped', 0, False, 0),             # in the queue again already
    ('RUNNING', 5, 'stopped', 0, False, 1),             # MAX_RESTARTS
])
def test_requeued_only_where_it_was_stopped(dry, tmp_path, state, restarts, said, status, back, code):
    lines = dict(stopped='stopped by SIGUSR1 at step 3 of 9; go on with --resume auto', done='done: x', failed='mixmix_nb: no',
                 full='mixmix_nb: stopped by SIGUSR1 at step 3 of 9, and its checkpoint could not be written (No space left on device); earlier ones stay in x')
    stub(tmp_path, 'python', f'case $1 in -c) exit 0;; esac\necho "{lines[said]}"; exit {status}\n')
    r = dry(STATE=state, SLURM_RESTART_COUNT=str(restarts), MAX_RESTARTS='5')
    assert r.returncode==code, r.stdout+r.stderr
    assert ('requeue 7' in calls(tmp_path))==back

@pytest.mark.parametrize('what,busy,back', [('show', 2, True), ('requeue', 2, True), ('show', 9, False), ('requeue', 9, False)])
def test_a_controller_that_is_busy_is_asked_again(dry, tmp_path, what, busy, back):
    "After some seconds, and not for ever. Where it does not answer at all the job fails, and is not put back unasked: it may have been cancelled."
    stub(tmp_path, 'python', 'case $1 in -c) exit 0;; esac\necho "stopped by SIGUSR1 at step 3 of 9; go on with --resume auto"\n')
    stub(tmp_path, 'scontrol', f'echo "scontrol: $*" >> calls; [ $1 != {what} ] || [ $(grep -c "scontrol: {what}" calls) -gt {busy} ] || exit 1; echo JobState=RUNNING\n')
    stub(tmp_path, 'sleep', f'case $1 in .*) exec {shutil.which("sleep")} $1;; esac; echo "sleep $1" >> calls\n')
    r, said = dry(), calls(tmp_path)
    assert r.returncode==(0 if back else 1) and ('requeued' in r.stdout)==back and ('submit again' in r.stderr)!=back, r.stdout+r.stderr
    assert said.count(f'scontrol: {what}')==(3 if back else 4) and 'sleep 2\n' in said and 'sleep 5\n' in said
    assert ('requeue 7' in said)==(what=='requeue' or back)

@pytest.mark.parametrize('name', ['SIGUSR1', 'SIGTERM'])
def test_a_signal_becomes_the_stop_file(dry, tmp_path, name):
    "The script waits for the run however many signals come, and puts the job back even where torchrun says 1 after a signal."
    stub(tmp_path, 'python', 'case $1 in -c) exit 0;; esac\necho up; until [ -e "$MIXMIX_STOP_FILE" ]; do sleep .05; done\n'
         'sleep 1; echo "stopped by the stop file at step 3 of 9; go on with --resume auto"; exit 1\n')
    p = subprocess.Popen(['bash', 'slurm/train.sh'], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=child_env(SLURM_JOB_ID='7', STATE='RUNNING', PATH=stub_path(tmp_path)))
    assert p.stdout.readline()=='up\n'
    for _ in range(3): p.send_signal(getattr(signal, name)); time.sleep(.2)
    out, _ = p.communicate(timeout=30)
    assert p.returncode==0 and 'requeued' in out and 'requeue 7' in calls(tmp_path)
    assert not list((tmp_path/'logs').iterdir()), 'the stop file is removed'

def test_a_run_that_finishes_in_spite_of_a_signal(dry, tmp_path):
    "The job ends with the run's status, not with that of an interrupted `wait`."
    stub(tmp_path, 'python', 'case $1 in -c) exit 0;; esac\necho up; until [ -e "$MIXMIX_STOP_FILE" ]; do sleep .05; done; sleep .5; echo "done: x"\n')
    p = subprocess.Popen(['bash', 'slurm/train.sh'], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=child_env(SLURM_JOB_ID='7', STATE='RUNNING', PATH=stub_path(tmp_path)))
    assert p.stdout.readline()=='up\n'
    p.send_signal(signal.SIGUSR1)
    p.communicate(timeout=30)
    assert p.returncode==0 and 'requeue' not in calls(tmp_path)

def test_prepare(tmp_path):
    project(tmp_path)
    stub(tmp_path, 'python', 'case $1 in -c) exit 0;; esac\necho "$*"; case "$*" in *fails*) exit 3;; esac\n')
    run = lambda *a, **env: bash('slurm/prepare.sh', *a, cwd=tmp_path, PATH=stub_path(tmp_path), **env)
    assert run().stdout.splitlines()==['-m mixmix_nb.coco --output-dir data/coco',
        '-m mixmix_nb.latents --data-path data/coco/imagefolder/train --out data/latents --num-workers 4']
    assert run(LATENTS='').stdout=='-m mixmix_nb.coco --output-dir data/coco\n'
    assert run(COCO='', DATA_PATH='my', VAE='mse').stdout=='-m mixmix_nb.latents --data-path my --out data/latents --num-workers 4 --vae mse\n'
    assert run('coco', '--val-only').stdout=='-m mixmix_nb.coco --val-only\n'
    r = run(COCO='fails')
    assert r.returncode==3 and 'latents' not in r.stdout, 'training must not begin on half a set'
    assert run('cocoa').returncode==2

def test_setup_env(tmp_path):
    "With conda: made once, then brought up to date. Without: a venv."
    shutil.copy(ROOT/'setup_env.sh', tmp_path)
    stub(tmp_path, 'conda', 'echo "conda $*" >> calls; case "$*" in "env list") [ ! -e made ] || echo "DiT  /x";; "env create"*) touch made;; esac\n')
    for _ in range(2): assert bash(tmp_path/'setup_env.sh', cwd='/', PATH=stub_path(tmp_path)).returncode==0
    made = [l for l in calls(tmp_path).splitlines() if 'environment.yml' in l]
    assert made==['conda env create --file environment.yml', 'conda env update --name DiT --file environment.yml']
    fake = '#!/bin/sh\necho "python $*" >> calls\n'
    stub(tmp_path, 'python3', 'echo "python3 $*" >> calls; case "$*" in *venv*) mkdir -p .venv/bin; printf '+repr(fake)+' > .venv/bin/python; chmod +x .venv/bin/python;; esac\n')
    for _ in range(2): assert bash(tmp_path/'setup_env.sh', 'venv', cwd='/', PATH=stub_path(tmp_path)).returncode==0
    c = calls(tmp_path)
    assert c.count('-m venv')==1 and c.count('python -m pip install --editable .[dev]')==2
    assert bash(tmp_path/'setup_env.sh', 'docker', cwd='/').returncode==2

# ---- with SLURM

@pytest.fixture(scope='module')
def cluster():
    "Two nodes; they end with this process, however it ends."
    lacks = [c for c in ('munged', 'slurmctld', 'slurmd', 'sbatch') if not shutil.which(c)]
    if lacks: pytest.skip(f'{", ".join(lacks)} not installed (Debian: apt-get install slurm-wlm munge)')
    with tempfile.TemporaryDirectory(prefix='slurm') as d:
        p = subprocess.Popen([ROOT/'tests'/'slurm_up.sh', d], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = p.stdout.readline()
        assert line.startswith('up'), 'the cluster does not come up; see what tests/slurm_up.sh says'
        yield Path(d)
        p.stdin.close(); p.wait(60)

@pytest.fixture(scope='module')
def pics(tmp_path_factory):
    "A folder of 60 small pictures: unlike the digits, it needs no scikit-learn, which takes two seconds to import at each start."
    d, rng = tmp_path_factory.mktemp('pics'), np.random.default_rng(0)
    for i in range(60):
        (d/'abc'[i%3]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8,8,3), dtype=np.uint8)).save(d/'abc'[i%3]/f'{i:02d}.png')
    return d

ENDS = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')

class Cluster:
    "What a user does: submit, look, signal."
    def __init__(self, conf, cwd, pics, waiting):
        self.conf, self.cwd, self.waiting, self.jobs = conf, project(cwd), waiting, []
        (cwd/'pics').symlink_to(pics)
    def env(self, **extra):
        return child_env(SLURM_CONF=str(self.conf/'slurm.conf'), OMP_NUM_THREADS='1', PYTHONPATH=f'{self.waiting}:{ROOT}',
                         PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', **extra)
    def do(self, *cmd, **env):
        r = subprocess.run(list(map(str, cmd)), cwd=self.cwd, env=self.env(**env), capture_output=True, text=True, timeout=60)
        assert r.returncode==0, (cmd, r.stderr)
        return r.stdout
    def submit(self, *args, options=(), script='train', waits=0, **env):
        job = self.do('sbatch', '--parsable', '--gpus-per-node=0', '--cpus-per-task=1', *options, f'slurm/{script}.sh', *args, WAITS=str(waits), **env).strip()
        self.jobs.append(job)
        return job
    def out(self, job): return ''.join(f.read_text() for f in (self.cwd/'logs').glob(f'*_{job}.out'))
    def about(self, job): return dict(p.split('=', 1) for p in self.do('scontrol', 'show', 'job', '--oneliner', job).split() if '=' in p)
    def more_time(self):
        "For jobs that come back: a slow machine is not to reach a short time limit again and again."
        for line in self.do('squeue', '--noheader', '--format=%i %r').splitlines():
            if line.endswith(' BeginTime'): self.do('scontrol', 'update', f'JobId={line.split()[0]}', 'TimeLimit=60')
    def until(self, job, what, seconds=240):
        "Wait until `what`, a text in its output or a function of `about`, is there."
        end = time.monotonic()+seconds
        while time.monotonic()<end:
            a = self.about(job)
            if what in self.out(job) if isinstance(what, str) else what(a): return a
            if a['JobState'] in ENDS: break
            self.more_time(); time.sleep(.2)
        raise AssertionError(f'waited for {what}: {self.about(job)}\n{self.out(job)[-3000:]}')
    def ended(self, job): return self.until(job, lambda a: a['JobState'] in ENDS)
    def signal(self, job, *options): self.do('scancel', *options, job)

@pytest.fixture
def slurm(cluster, tmp_path, pics, waiting):
    c = Cluster(cluster, tmp_path, pics, waiting)
    yield c
    for j in c.jobs: subprocess.run(['scancel', '--full', j], env=c.env())

def only_run(folder):
    runs = list((folder/'results').iterdir())
    assert len(runs)==1, f'one job, one folder: {runs}'
    return runs[0]

def final(folder): return torch.load(only_run(folder)/'checkpoints'/'final.pt', weights_only=True)

def stopped(out): return [int(n) for n in re.findall(r'stopped by .* at step (\d+) of', out)]

def alone(folder, pics, *args):
    "The undisturbed run, without SLURM: in this process, which has imported torch already, with one thread as the jobs have."
    n = torch.get_num_threads(); torch.set_num_threads(1)
    try: main([*SMALL, *args, '--data-path', str(pics), '--results-dir', str(folder/'results')])
    finally: torch.set_num_threads(n)
    return final(folder)

@pytest.fixture(scope='module')
def whole(tmp_path_factory, pics): return alone(tmp_path_factory.mktemp('whole'), pics, '--steps', '40')

def same_run(mine, whole):
    for k in ('model', 'ema', 'opt', 'meter', 'train_steps', 'epoch'): same(mine[k], whole[k], k)

@pytest.fixture(scope='module')
def timed(cluster, tmp_path_factory, pics, waiting):
    "The job of `test_time_limit`, submitted early: most of its minute it waits."
    c = Cluster(cluster, tmp_path_factory.mktemp('timed'), pics, waiting)
    alone(c.cwd/'first', pics, '--steps', '10')
    c.submit('--resume', 'first/results/000-DiT-N-8/checkpoints/final.pt', '--steps', '40', options=['--time=1', '--signal=B:USR1@25'], waits=1)
    yield c
    for j in c.jobs: subprocess.run(['scancel', '--full', j], env=c.env())

@pytest.mark.usefixtures('timed')
def test_preempted_twice_and_bit_identical(slurm, whole, tmp_path, say):
    job = slurm.submit(*SMALL, '--steps', '40', waits=2)
    slurm.until(job, 'start 0, rank 0 on node 0 waits'); slurm.signal(job, '--signal=USR1', '--batch')
    slurm.until(job, 'start 1, rank 0 on node 0 waits'); slurm.signal(job, '--signal=TERM', '--batch')
    about, out = slurm.ended(job), slurm.out(job)
    assert (about['JobState'], about['Restarts'], about['ExitCode'])==('COMPLETED', '2', '0:0'), out
    assert stopped(out)==[5, 10], out
    same_run(final(tmp_path), whole)
    say('SLURM, one node: stopped at steps [5, 10], requeued twice, finished in one folder, final.pt as undisturbed to the last bit')

@pytest.mark.usefixtures('timed')
def test_training_waits_for_preparation(slurm):
    "afterok: training begins once the latents are there, and never where preparation failed."
    tiny_model().save_pretrained(slurm.cwd/'vae')
    first = slurm.submit(script='prepare', COCO='', DATA_PATH='pics', LATENTS='latents', VAE='vae', IMAGE_SIZE='16')
    then = slurm.submit('--steps', '2', '--num-sample-images', '0', options=[f'--dependency=afterok:{first}'], DATA_PATH='latents', MODEL='DiT-N/4')
    fails = slurm.submit('cocoa', script='prepare')
    never = slurm.submit(options=[f'--dependency=afterok:{fails}'])
    a, b = slurm.ended(first), slurm.ended(then)
    assert (a['JobState'], b['JobState'])==('COMPLETED', 'COMPLETED') and b['StartTime']>=a['EndTime'], slurm.out(first)+slurm.out(then)
    assert '60 images of 4×4×4' in slurm.out(then)
    assert slurm.ended(fails)['ExitCode']=='2:0'
    slurm.until(never, lambda a: (a['JobState'], a['Reason'])==('PENDING', 'DependencyNeverSatisfied'))
    assert not slurm.out(never)

@pytest.mark.usefixtures('timed')
def test_failure_and_cancellation_end_the_job(slurm):
    "A wrong option: status 2, one start. A job that its owner cancels does not come back, although it could write its checkpoint."
    bad, long = slurm.submit(*SMALL, '--lr', '-1'), slurm.submit(*SMALL, '--steps', '1000000', waits=1)
    a = slurm.ended(bad)
    assert (a['JobState'], a['ExitCode'], a['Restarts'])==('FAILED', '2:0', '0') and '--lr must be positive' in slurm.out(bad)
    slurm.until(long, 'waits'); slurm.signal(long)
    slurm.until(long, lambda a: a['JobState']=='CANCELLED'); time.sleep(1)
    a = slurm.about(long)
    assert (a['JobState'], a['Restarts'])==('CANCELLED', '0') and stopped(slurm.out(long))==[5]

def test_two_nodes_train(slurm, whole, tmp_path, say):
    """A run on two nodes is the run of one process to summation order. It is stopped twice: by way of the script, and, as at preemption with grace,
    by a SIGTERM that comes to torchrun and its processes and not to the script."""
    i = SMALL.index('--batch-size')
    job = slurm.submit(*SMALL[:i], *SMALL[i+2:], '--global-batch-size', '20', '--steps', '40', options=['--nodes=2'], waits=2, **HERE_TOO)
    for start, how in enumerate([['--signal=USR1', '--batch'], ['--signal=TERM']]):
        slurm.until(job, lambda _: {'0', '1'}==set(re.findall(rf'start {start}, rank . on node (.) waits', slurm.out(job))))
        slurm.signal(job, *how)
    a, out = slurm.ended(job), slurm.out(job)
    assert (a['JobState'], a['Restarts'], a['ExitCode'])==('COMPLETED', '2', '0:0') and len(stopped(out))==2 and '2 processes' in out, out
    mine, whole = final(tmp_path)['model'], whole['model']
    far = max((mine[k]-whole[k]).abs().max().item() for k in whole if whole[k].is_floating_point())
    assert far<1e-5, far
    say(f'SLURM, two nodes: stopped at steps {stopped(out)}, requeued twice, finished; largest difference to one process {far:.0e}')

def test_time_limit(timed, whole, say):
    """SLURM itself sends the signal: with --time=1 between 5 and 35 s after the start, since it looks every 30 s. The job began with a checkpoint
    of a run outside its own results folder, and goes on there."""
    job, = timed.jobs
    a, out = timed.ended(job), timed.out(job)
    assert a['JobState']=='COMPLETED' and int(a['Restarts'])==len(stopped(out))>0, out
    for n in [10, *stopped(out)]: assert re.search(rf'^first/results/000-DiT-N-8: .* from step {n}$', out, re.M), out
    assert 'SIGUSR1: asking' in out and not (timed.cwd/'results').exists(), out
    same_run(final(timed.cwd/'first'), whole)
    say(f'SLURM, --time=1: the signal came by itself at step {stopped(out)[0]}; a run outside of the results folder gone on with, to the last bit')
