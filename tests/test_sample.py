"Many images: the same bytes on any number of processes, and after SIGKILL."
import signal, subprocess, sys, time
import numpy as np, pytest
from PIL import Image
from conftest import child_env, python, torchrun, train

@pytest.fixture(scope='module')
def run(tmp_path_factory): # the folder of a short run
    d = tmp_path_factory.mktemp('run')
    train('--steps', 30, '--num-sample-images', 0, cwd=d)
    return next((d/'results').iterdir())

def command(run, *more):
    return ['-m', 'mixmix_nb.sample', '--ckpt', run, '--num-sampling-steps', 25, '--num-images', 60, '--batch-size', 8, '--labels', 'random', *more]

@pytest.fixture(scope='module')
def alone(run): # the bytes that one process writes
    r = python(*command(run, '--npz', 'one'), cwd=run.parent, OMP_NUM_THREADS=1)
    assert r.returncode==0, r.stderr
    return (run.parent/'one.npz').read_bytes()

@pytest.mark.parametrize('n', (2, 4))
def test_the_same_bytes_on_any_number_of_processes(run, alone, tmp_path, n):
    r = torchrun(n, *command(run, '--npz', 'images'), cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert (tmp_path/'images.npz').read_bytes()==alone and [p.name for p in tmp_path.iterdir()]==['images.npz']

def test_continues_after_a_kill(run, alone, tmp_path):
    args, parts = [sys.executable, *map(str, command(run, '--npz', 'images'))], tmp_path/'images.npz.parts'
    p = subprocess.Popen(args, cwd=tmp_path, env=child_env(OMP_NUM_THREADS=1))
    while p.poll() is None and len(list(parts.glob('*.npy')))<3: time.sleep(.005)
    p.send_signal(signal.SIGKILL)
    p.wait()
    written = {f: f.stat().st_mtime_ns for f in parts.glob('*.npy')}
    assert 3<=len(written)<8, 'killed in the middle'
    other = python(*command(run, '--npz', 'images', '--seed', 1), cwd=tmp_path)
    assert other.returncode==2 and 'different seed' in other.stderr and len(other.stderr.splitlines())==1
    assert {f: f.stat().st_mtime_ns for f in parts.glob('*.npy')}==written, 'nothing was drawn again'
    r = python(*command(run, '--npz', 'images'), cwd=tmp_path, OMP_NUM_THREADS=1)
    assert r.returncode==0 and (tmp_path/'images.npz').read_bytes()==alone

def test_a_folder_of_images(run, alone, tmp_path):
    r = torchrun(2, *command(run, '--each', '--out', 'each'), cwd=tmp_path)
    assert r.returncode==0, r.stderr
    with np.load(run.parent/'one.npz') as d: images, labels = d['arr_0'], d['arr_1']
    for i in range(60): assert (np.asarray(Image.open(tmp_path/'each'/f'{i:06d}_{labels[i]}.png'))==images[i]).all()

def test_half_precision_and_the_way_there(run, tmp_path):
    "bf16 gives nearly the same images; a film of the way has its frames."
    def draw(*more): return python(*command(run, *more), cwd=tmp_path)
    a, b = draw('--npz', 'a', '--labels', 'balanced'), draw('--npz', 'b', '--labels', 'balanced', '--mixed-precision', 'bf16')
    assert a.returncode==b.returncode==0, a.stderr+b.stderr
    with np.load(tmp_path/'a.npz') as x, np.load(tmp_path/'b.npz') as y: gap = abs(x['arr_0'].astype(int)-y['arr_0'])
    assert 0<gap.mean()<3, gap.mean()
    r = python('-m', 'mixmix_nb.sample', '--ckpt', run, '--num-sampling-steps', 4, '--num-images', 10, '--trajectory', 'way', cwd=tmp_path)
    assert r.returncode==0 and Image.open(tmp_path/'way.gif').n_frames==4, r.stderr

@pytest.mark.parametrize('options,words', [
    (['--sampler', 'heun', '--eta', 0], '--eta is for'), (['--cfg-scale', 1, '--guidance-rescale', .5], 'does nothing without guidance'),
    (['--labels', 'random', '--classes', '3'], 'without --classes'), (['--npz', 'a', '--out', 'b'], 'omit --out'), (['--out', '.'], 'names no file'),
    (['--trajectory', '.'], '--trajectory . names no file'), (['--interpolate', '--sampler', 'ddpm'], 'without new noise'), (['--guidance-interval', '.8,.2'], 'must look like'),
    (['--npz', 'there'], 'was not written by this command'), (['--each', '--out', 'full'], 'is not empty'), (['--num-sampling-steps', 0], 'positive integer')])
def test_bad_input(run, tmp_path, options, words):
    from mixmix_nb.cli import parse
    from mixmix_nb.config import SampleConfig
    from mixmix_nb.core import UserError
    from mixmix_nb.sample import sample
    (tmp_path/'full').mkdir()
    for f in ('there.npz', 'full/a.txt'): (tmp_path/f).write_bytes(b'')
    before = sorted(tmp_path.rglob('*'))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path)
        with pytest.raises(UserError, match=words): sample(**parse(SampleConfig, ['--ckpt', str(run), *map(str, options)]))
    assert sorted(tmp_path.rglob('*'))==before, 'nothing may be written'
