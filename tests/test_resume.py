"A run that is killed or stopped and resumed ends like one that was left alone: bit-identical on a CPU."
import csv, json, shutil, signal, subprocess, sys
import pytest, torch
from conftest import SMALL, child_env, python, train

RUN = [*SMALL, '--steps', 24, '--ckpt-every', 6, '--lr', '1e-3']
# kills itself inside the writing of the N-th checkpoint, after half of its bytes
KILLED = '''
import os, signal, sys, torch
real, count = torch.save, 0
class Half:
    def __init__(self, f, n): self.f, self.n = f, n
    def write(self, b):
        self.n -= len(b)
        if self.n<0: self.f.flush(); os.kill(os.getpid(), signal.SIGKILL)
        return self.f.write(b)
    def __getattr__(self, k): return getattr(self.f, k)
def save(state, f):
    global count
    count += 1
    real(state, Half(f, 2_000_000) if count==int(sys.argv[1]) else f)
torch.save = save
from mixmix_nb.config import main
main("train", sys.argv[2:])
'''

def load(path): return torch.load(path, weights_only=True)

def flat(d, prefix=''): # dict of tensors and plain values by dotted name
    if isinstance(d, (list, tuple)): d = dict(enumerate(d))
    if not isinstance(d, dict): return {prefix: d}
    return {k: v for a,b in d.items() for k,v in flat(b, f'{prefix}.{a}').items()}

def assert_same(a, b, keys=('model', 'ema', 'opt', 'train_steps')):
    "Two checkpoints hold the same numbers, bit for bit."
    for key in keys:
        x, y = flat(a[key]), flat(b[key])
        assert x.keys()==y.keys(), key
        for k in x: assert torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k]==y[k], (key, k)

def metrics(run): # rows of metrics.csv without what a clock or the machine decides
    with open(run/'metrics.csv') as f:
        return [{k: v for k,v in r.items() if k not in ('images_per_sec', 'peak_memory_mb')} for r in csv.DictReader(f)]

@pytest.fixture(scope='module')
def alone(tmp_path_factory): # the folder of an undisturbed run
    d = tmp_path_factory.mktemp('alone')
    train(*RUN, cwd=d)
    return next((d/'results').iterdir())

def test_killed_inside_a_write(alone, tmp_path):
    for n in (2, 3):                                # the second checkpoint of the first life; the third of the second
        r = python('-c', KILLED, n, *RUN, *(['--resume', 'auto'] if n==3 else []), cwd=tmp_path)
        assert r.returncode==-signal.SIGKILL, r.stdout+r.stderr
    assert list(tmp_path.glob('results/*/checkpoints/*.tmp')), 'it was not killed inside a write'
    r = train(*RUN, '--resume', 'auto', cwd=tmp_path)
    run, = (tmp_path/'results').iterdir()
    assert not list(run.rglob('*.tmp'))
    assert_same(load(run/'checkpoints'/'final.pt'), load(alone/'checkpoints'/'final.pt'))
    assert metrics(run)==metrics(alone)
    assert [s['processes'] for s in json.loads((run/'config.json').read_text())['starts']]==[1, 1, 1], 'every start is in config.json'

@pytest.mark.parametrize('name,status', [('SIGTERM', 0), ('SIGINT', 0), ('SIGUSR1', 75)])
def test_a_signal_saves_and_stops(tmp_path, name, status):
    slurm = dict(SLURM_JOB_ID=7) if status else {}
    p = subprocess.Popen([sys.executable, '-m', 'mixmix_nb.train', *map(str, SMALL), '--steps', '100000'], cwd=tmp_path, env=child_env(**slurm),
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in p.stdout:
        if 'step       5' in line: break
    p.send_signal(getattr(signal, name))
    out, _ = p.communicate(timeout=60)
    assert p.returncode==status, out
    run, = (tmp_path/'results').iterdir()
    newest = max((run/'checkpoints').glob('*.pt'))
    assert f'stopped by {name} at step {int(newest.stem)} of 100000' in out, out
    assert load(newest)['train_steps']==int(newest.stem)>=5

def test_resume_auto_never_starts_over_in_silence(alone, tmp_path):
    alone = shutil.copytree(alone, tmp_path/'kept'/alone.name)          # it is continued below
    r = train(*RUN, '--results-dir', alone.parent, '--resume', 'auto', cwd=tmp_path)
    assert 'nothing to do, all 24 steps are done' in r.stdout
    r = train(*SMALL, '--steps', 1, '--lr', '2e-3', '--results-dir', tmp_path, cwd=tmp_path)
    r = train(*SMALL, '--steps', 1, '--lr', '3e-3', '--results-dir', tmp_path, '--resume', 'auto', cwd=tmp_path)
    assert 'is not continued because --lr 0.002 there, 0.003 here' in r.stdout and '--resume' in r.stdout
    r = python('-m', 'mixmix_nb.train', '--resume', alone, '--lr', '2e-3', cwd=tmp_path)
    assert r.returncode==2 and 'cannot resume with other options: --lr 0.001 there, 0.002 here' in r.stderr and len(r.stderr.splitlines())==1
    r = train('--resume', alone, '--steps', 26, '--log-every', 1, cwd=tmp_path)         # a folder works; the rest comes from the checkpoint
    assert 'resumed at step 24' in r.stdout and 'step      26/26' in r.stdout

def test_a_resumed_run_holds_no_checkpoint(alone, tmp_path):
    "Bug 1 of the first edition: 16 bytes per parameter stayed in memory for the whole resumed run."
    code = '''
import gc, weakref, mixmix_nb.resume as r, mixmix_nb.train as t
from mixmix_nb.trainer import Callback
real, refs = r.read_checkpoint, []
def read(*a, **kw):
    c = real(*a, **kw)
    refs.extend(weakref.ref(x) for d in (c["model"], c["ema"]) for x in d.values())
    refs.extend(weakref.ref(x) for s in c["opt"]["state"].values() for x in s.values())
    return c
r.read_checkpoint = read
class Look(Callback):
    def after_step(self, trainer): gc.collect(); print("alive", sum(ref() is not None for ref in refs), "of", len(refs))
make = t.make_callbacks
t.make_callbacks = lambda *a: [*make(*a), Look()]
t.train(resume=%r, steps=25)
''' % str(alone/'checkpoints'/'0000018.pt')
    r = python('-c', code, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    counts = [l.split() for l in r.stdout.splitlines() if l.startswith('alive')]
    assert counts and all(int(c[1])==0 and int(c[3])>100 for c in counts), counts

def test_auto_is_not_frozen(alone):
    "Bug 2: what `auto` came to is logged and not stored."
    assert load(alone/'checkpoints'/'final.pt')['args']['compile']=='auto'

def test_a_checkpoint_of_the_first_edition(alone, tmp_path):
    "It had the moments by parameter name, everything else in `args`, older names, and no facts."
    new = load(alone/'checkpoints'/'0000012.pt')
    facts, args = new['facts'], dict(new['args'])
    args |= dict(sample_steps=args.pop('num_sampling_steps'), global_seed=args.pop('seed'), channels=facts['shape'][0],
                 input_size=facts['shape'][1], fingerprint='0f9be566800b6e53', mixed_precision='no', compile='off', batch_size=12,
                 **{k: facts[k] for k in ('image_size', 'num_classes', 'classes', 'learn_sigma', 'flip', 'vae')})
    old = dict(model=new['model'], ema=new['ema'], opt=new['opt']['state'], scaler=None, train_steps=12, epoch=0, bad_files=[],
               meter=dict(steps=torch.tensor(0.), loss=torch.tensor(0.)), args=args, version=1)
    torch.save(old, tmp_path/'old.pt')
    train('--resume', 'old.pt', cwd=tmp_path)
    run, = (tmp_path/'results').iterdir()
    assert_same(load(alone/'checkpoints'/'final.pt'), load(run/'checkpoints'/'final.pt'), ('model', 'ema', 'opt'))
    r = python('-m', 'mixmix_nb.sample', '--ckpt', 'old.pt', '--num-sampling-steps', 2, cwd=tmp_path)
    assert r.returncode==0 and (tmp_path/'samples.png').exists(), r.stderr
