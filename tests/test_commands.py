"Commands as a person types them: bad input gets one line and status 2, Ctrl-C loses nothing, a sample depends on its seed alone."
import importlib, os, pickle, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from conftest import child_env, forked, python
from mixmix_nb import sample, train
from mixmix_nb.core import UserError
from mixmix_nb.training import read_checkpoint

@pytest.fixture
def one_line(tmp_path, monkeypatch, capsys):
    "Give a command bad input, in this process or in an interpreter of its own; returns the one line that it says."
    monkeypatch.chdir(tmp_path)
    def run(command, *args, alone=False):
        if alone: r = python('-m', f'mixmix_nb.{command}', *args, cwd=tmp_path); status, said = r.returncode, r.stderr
        else:
            with pytest.raises(SystemExit) as e: importlib.import_module(f'mixmix_nb.{command}').main([str(a) for a in args])
            status, said = e.value.code, capsys.readouterr().err
        lines = said.strip().splitlines()
        assert status==2 and len(lines)==1 and lines[0].startswith('mixmix_nb: '), (status, said)
        return lines[0]
    return run

@pytest.mark.parametrize('args,words', [
    ('--data-path nowhere', 'nowhere'), ('--data-path empty', 'expected <data-path>/<class>'), ('--model DiT-Q/3', 'DiT-XL/2'), ('--lr -1', '--lr'),
    ('--batch-size 0', '--batch-size'), ('--steps many', '--steps'), ('--epoch 3', '--epochs'), ('--num-classes 3', '10 classes'),
    ('--image-size 7', 'divisible'), ('--resume nothing.pt', 'nothing.pt'), ('--data-path photos', '--vae none'), ('--data-path photos --image-size 16 --num-classes 5', 'class'),
    ('--resume evil.pt', 'refused'), ('--resume torn.pt', 'torn'), ('--device cuda:77', 'device'), ('--accumulate 5', 'does not divide'), ('--global-batch-size 8 --batch-size 4', '--global-batch-size 8'),
    ('--mixed-precision fp8', 'bf16'), ('--compile maybe', 'auto'), ('--cache-latents', '--vae'), ('--results-dir=', '--results-dir is empty'), ('--resume=', '--resume is empty'),
    ('--resume hollow.pt --model DiT-N/8', 'cannot be resumed'),
])
def test_bad_input(args, words, tmp_path, one_line):
    (tmp_path/'empty').mkdir(); (tmp_path/'photos').mkdir()
    Image.fromarray(np.zeros((20,20,3), np.uint8)).save(tmp_path/'photos'/'a.png')
    torch.save(dict(x=Evil()), tmp_path/'evil.pt'); torch.save(dict(x=torch.zeros(1000)), tmp_path/'whole.pt')
    torch.save(dict(args={}, model={}, ema={}, opt={}, meter={}, train_steps='x'), tmp_path/'hollow.pt')
    (tmp_path/'torn.pt').write_bytes((tmp_path/'whole.pt').read_bytes()[:900])
    before = sorted(os.listdir(tmp_path))
    assert words in one_line('train', *args.split(), alone=words=='nowhere')
    assert sorted(os.listdir(tmp_path))==before, 'nothing may be written'

class Evil:
    def __reduce__(self): return os.mkdir, ('pwned',)

def start(cwd, *args):
    p = subprocess.Popen([sys.executable, '-m', 'mixmix_nb.train', *args], cwd=cwd, env=child_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if ' loss ' in line: return p
    raise AssertionError(p.stderr.read())

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM], ids=['ctrl-c', 'sigterm'])
def test_stopped_by_a_signal_and_resumed(sig, tmp_path):
    args = '--model DiT-N/8 --batch-size 20 --log-every 5 --num-sample-images 0 --steps 100000'.split()
    p = start(tmp_path, *args)
    p.send_signal(sig)
    out, err = p.communicate(timeout=60)
    assert '--resume auto' in out and not err, (out, err)
    ckpt, = (tmp_path/'results'/'000-DiT-N-8'/'checkpoints').glob('*.pt')
    n = int(ckpt.stem)
    r = forked('-m', 'mixmix_nb.train', '--resume', 'auto', '--steps', n+10, cwd=tmp_path)
    assert r.returncode==0 and f'from step {n}' in r.stdout, r.stdout+r.stderr

def test_sample_depends_on_the_seed_alone(tmp_path, one_line):
    assert forked('-m', 'mixmix_nb.train', '--steps', '30', '--num-sample-images', '0', cwd=tmp_path).returncode==0
    ckpt, few = ('--ckpt', 'results/000-DiT-N-2/checkpoints/final.pt'), ('--num-sampling-steps', '10', '--sampler', 'ddpm')
    def draw(name, *more):
        sample.main([*ckpt, *few, '--num-images', '12', '--out', name, *more])
        return np.asarray(Image.open(tmp_path/name)).astype(int)
    a, b, c = draw('a.png', '--batch-size', '12'), draw('b.png', '--batch-size', '5'), draw('c.png', '--seed', '1')
    assert abs(a-b).max()<=1 and abs(a-c).max()>50
    r = python('-m', 'mixmix_nb.sample', *ckpt, '--num-images', '3', '--num-sampling-steps', '2', '--each', '--out', 'each', cwd=tmp_path)
    assert r.returncode==0 and len(list((tmp_path/'each').glob('*.png')))==3
    for args in (['--ckpt', 'none.pt'], [], [*ckpt, '--classes', 'cat'], [*ckpt, '--sampler', 'ddim', '--eta', '2'], [*ckpt, '--each', '--out', 'x.png'], [*ckpt, '--num-images', '100000000']):
        one_line('sample', *args)

def test_a_reader_who_leaves_ends_nothing(tmp_path):
    "`train | head -1`: the run goes on without anybody to print for."
    args = '--model DiT-N/8 --batch-size 20 --log-every 1 --num-sample-images 0 --steps 40'.split()
    p = subprocess.Popen([sys.executable, '-m', 'mixmix_nb.train', *args], cwd=tmp_path, env=child_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline(); p.stdout.close()
    assert p.wait(timeout=120)==0, p.stderr.read()
    run = tmp_path/'results'/'000-DiT-N-8'
    assert (run/'checkpoints'/'final.pt').exists() and 'done' in (run/'log.txt').read_text()

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_resumed_in_half_precision_and_in_parts(precision, tmp_path, monkeypatch, capsys):
    "Scaler, parts and checkpointed blocks: cut and resumed, the same weights to the last bit; another choice is allowed, and said."
    args = f'--model DiT-N/8 --batch-size 20 --accumulate 2 --grad-checkpoint --mixed-precision {precision} --lr-schedule constant --log-every 5 --num-sample-images 0'.split()
    monkeypatch.chdir(tmp_path)
    def run(results, *more):
        train.main([*more, '--results-dir', results])
        return capsys.readouterr().out, torch.load(tmp_path/results/'000-DiT-N-8'/'checkpoints'/'final.pt', weights_only=True)
    _, whole = run('whole', *args, '--steps', '16')
    _, half = run('cut', *args, '--steps', '9')
    assert (half['scaler'] is not None)==(precision=='fp16')
    said, cut = run('cut', '--resume', 'auto', '--steps', '16')
    assert 'from step 9' in said and 'last bit' not in said, said
    for k in ('model', 'ema'): assert all(torch.equal(cut[k][n], whole[k][n]) for n in whole[k])
    assert cut['scaler']==whole['scaler']
    said, _ = run('cut', '--resume', 'auto', '--steps', '17', '--mixed-precision', 'no')
    assert 'last bit' in said and '--mixed-precision' in said, said

class Payload:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

@pytest.mark.parametrize('container', ['zip', 'old', 'pickle'])
@pytest.mark.parametrize('payload', [(os.mkdir, 'pwned'), (os.system, 'touch pwned'), (exec, 'open("pwned", "w")'), (eval, 'open("pwned", "w")'),
                                     (subprocess.call, ['touch', 'pwned']), (Path.touch, Path('pwned')), (open, 'pwned', 'w')], ids=lambda p: p[0].__qualname__)
def test_a_crafted_pickle_is_refused_and_does_not_run(payload, container, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = dict(model=dict(w=torch.zeros(3)), args=Payload(*payload))
    if container=='pickle': Path('evil.pt').write_bytes(pickle.dumps(state['args']))
    else: torch.save(state, 'evil.pt', _use_new_zipfile_serialization=container=='zip')
    with pytest.raises(UserError, match='evil.pt') as e: read_checkpoint('evil.pt')
    assert '\n' not in str(e.value) and os.listdir()==['evil.pt']
    torch.load('evil.pt', weights_only=False) if container!='pickle' else pickle.loads(Path('evil.pt').read_bytes())
    assert sorted(os.listdir())==['evil.pt', 'pwned'], 'the payload does run where it is trusted'
