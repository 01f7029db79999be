"Commands as a person types them: bad input gets one line and status 2, a sample depends on its seed alone, nothing crafted runs."
import argparse, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from conftest import SMALL, child_env, python, train
from mixmix_nb.core import UserError
from mixmix_nb.checkpoints import read_checkpoint
from mixmix_nb.train import train as train_function

class Evil:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

@pytest.mark.parametrize('options,words', [
    (dict(data_path='nowhere'), 'nowhere'), (dict(data_path='empty'), 'no images'), (dict(model='DiT-Q/3'), 'DiT-Q/3'), (dict(lr=-1), '--lr must be at least'),
    (dict(batch_size=0), '--batch-size must be at least 1'), (dict(steps='many'), '--steps must be an integer'), (dict(epoch=3), 'did you mean epochs'),
    (dict(num_classes=3), '10 classes'), (dict(model='DiT-N/5'), 'divisible'), (dict(resume='nothing.pt'), 'does not exist'), (dict(data_path='photos'), '--vae'),
    (dict(data_path='photos', image_size=16, num_classes=5), 'no class folders'), (dict(resume='evil.pt'), 'could run a program'),
    (dict(resume='truncated.pt'), 'truncated'), (dict(device='cuda:77'), 'is not available'), (dict(accumulate=5), 'not divisible by --accumulate 5'),
    (dict(global_batch_size=8, batch_size=4), 'pass only one of the two'), (dict(mixed_precision='fp8'), 'one of no, bf16'), (dict(compile='maybe'), 'one of auto'),
    (dict(cache_latents=True), '--vae'), (dict(results_dir=''), '--results-dir is empty'), (dict(steps=3, epochs=1), 'not both'), (dict(plugin='nobody'), 'no such module'),
    (dict(resume='weights.pt'), 'weights only'), (dict(num_sampling_steps='0'), '--num-sampling-steps'), (dict(sampler='rk4'), 'one of ddpm, ddim'),
    (dict(metrics='fid'), "unknown metric 'fid'"),
], ids=lambda o: ','.join(o) if isinstance(o, dict) else '')
def test_bad_input(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for d in ('empty', 'photos'): Path(d).mkdir()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save('photos/a.png')
    torch.save(dict(x=Evil(os.mkdir, 'pwned')), 'evil.pt')
    torch.save(dict(ema=dict(w=torch.zeros(1000))), 'weights.pt')
    Path('truncated.pt').write_bytes(Path('weights.pt').read_bytes()[:900])
    before = sorted(os.listdir())
    with pytest.raises(UserError) as e: train_function(**options)
    assert words in str(e.value) and e.value.status==2, e.value
    assert sorted(os.listdir())==before, 'nothing may be written'

@pytest.mark.parametrize('command,args', [('train', ['--data-path', 'nowhere']), ('train', ['--epoch', '3']), ('sample', []), ('sample', ['--ckpt', 'none.pt']),
                                          ('latents', ['--data-path', 'digits']), ('coco', ['--label', 'none']), ('plan', ['--dataset-size', '0']),
                                          ('plan', ['--dataset-size', '9', '--image-size', '32', '--model', 'DiT-S/4', '--memory', '0.1']),
                                          ('interop', ['--ckpt', 'none.pt', '--out', 'folder'])])
def test_one_line_and_status_2(command, args, tmp_path):
    r = python('-m', f'mixmix_nb.{command}', *args, cwd=tmp_path)
    lines = r.stderr.strip().splitlines()
    assert r.returncode==2 and len(lines)==1 and lines[0].startswith('mixmix_nb: '), r.stderr
    assert not os.listdir(tmp_path)

@pytest.mark.parametrize('payload', [(os.mkdir, 'pwned'), (os.system, 'touch pwned'), (exec, 'open("pwned", "w")'), (subprocess.call, ['touch', 'pwned']), (open, 'pwned', 'w')],
                         ids=lambda p: p[0].__qualname__)
def test_a_crafted_pickle_is_refused_and_does_not_run(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=dict(w=torch.zeros(3)), args=Evil(*payload)), 'evil.pt')
    with pytest.raises(UserError, match='evil.pt'): read_checkpoint('evil.pt')
    assert os.listdir()==['evil.pt']
    torch.load('evil.pt', weights_only=False)
    assert sorted(os.listdir())==['evil.pt', 'pwned'], 'the payload does run if it is trusted'

@pytest.fixture(scope='module')
def run(tmp_path_factory): # the folder of a short run
    d = tmp_path_factory.mktemp('run')
    train('--steps', 30, '--num-sample-images', 0, cwd=d)
    return next((d/'results').iterdir())

def test_sample_depends_on_the_seed_alone(run, tmp_path):
    def draw(name, *more):
        r = python('-m', 'mixmix_nb.sample', '--ckpt', run, '--num-sampling-steps', 10, '--sampler', 'ddpm', '--num-images', 12, '--out', name, *more, cwd=tmp_path)
        assert r.returncode==0, r.stderr
        return np.asarray(Image.open(tmp_path/name)).astype(int)
    a, b, c = draw('a.png', '--batch-size', 12), draw('b.png', '--batch-size', 5), draw('c.png', '--seed', 1)
    assert abs(a-b).max()<=1 and abs(a-c).max()>50

def test_class_names_come_first(run):
    from mixmix_nb.load import class_ids
    facts = dict(num_classes=4, classes=['2', 'cat', 'salt, pepper', '10'])
    assert class_ids('2,10', facts)==[0, 3] and class_ids('#2,cat', facts)==[2, 1] and class_ids('"salt, pepper",#0', facts)==[2, 0]
    for bad in ('3', 'salt', '#4', ''):
        with pytest.raises(UserError, match='available: #0 to #3, 2, cat, "salt, pepper", 10'): class_ids(bad, facts)

def test_checkpoints_of_the_official_script(run, tmp_path):
    "Bug 3: {model, ema, opt, args: Namespace}, and the prefixes of DDP and torch.compile."
    ema = torch.load(run/'checkpoints'/'final.pt', weights_only=True)['ema']
    torch.save(dict(model=ema, ema={f'module._orig_mod.{k}': v for k,v in ema.items()}, opt={}, args=argparse.Namespace(model='DiT-N/2', image_size=8)), tmp_path/'official.pt')
    torch.save(ema, tmp_path/'bare.pt')
    images = []
    for f in ('official.pt', 'bare.pt'):
        r = python('-m', 'mixmix_nb.sample', '--ckpt', f, '--num-sampling-steps', 4, '--sampler', 'ddim', '--cfg-scale', 1, '--out', f, cwd=tmp_path)
        assert r.returncode==0, r.stderr
        images.append(np.asarray(Image.open(tmp_path/f'{f}.png')))
    assert (images[0]==images[1]).all()

def test_a_reader_who_leaves_ends_nothing(tmp_path):
    "`train | head -1`: training continues although nobody reads."
    p = subprocess.Popen([sys.executable, '-m', 'mixmix_nb.train', *map(str, SMALL), '--steps', '20'], cwd=tmp_path, env=child_env(),
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline()
    p.stdout.close()
    assert p.wait(timeout=120)==0, p.stderr.read()
    run, = (tmp_path/'results').iterdir()
    assert (run/'checkpoints'/'final.pt').exists() and 'done' in (run/'log.txt').read_text()

def test_bare_containers(tmp_path):
    "No home folder, unknown user, no C++ compiler: training runs, `--compile on` says what is missing."
    env = dict(HOME='/nonexistent', USER='', PATH=str(Path(sys.executable).parent), XDG_CACHE_HOME='/nonexistent')
    train(*SMALL, '--steps', 2, cwd=tmp_path, **env)
    r = python('-m', 'mixmix_nb.train', *SMALL, '--steps', 2, '--compile', 'on', cwd=tmp_path, **env)
    assert r.returncode==2 and 'C++ compiler' in r.stderr and len(r.stderr.splitlines())==1, r.stderr

def test_half_precision_resumes_exactly(tmp_path):
    "Scaler, parts and recomputed blocks: cut and resumed, the same weights."
    args = [*SMALL, '--accumulate', 2, '--grad-checkpoint', '--mixed-precision', 'fp16', '--lr-schedule', 'constant']
    train(*args, '--steps', 12, '--results-dir', 'whole', cwd=tmp_path)
    train(*args, '--steps', 7, '--results-dir', 'cut', cwd=tmp_path)
    train('--resume', 'auto', '--steps', 12, '--results-dir', 'cut', cwd=tmp_path)
    whole, cut = (torch.load(next((tmp_path/d).glob('*/checkpoints/final.pt')), weights_only=True) for d in ('whole', 'cut'))
    assert cut['scaler'] and cut['scaler']==whole['scaler']
    for k in ('model', 'ema'): assert all(torch.equal(cut[k][n], whole[k][n]) for n in whole[k])
