"Encoding that is killed anywhere, shared by processes or sent to the wrong folder; training from what it wrote."
import csv, json, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from PIL import Image
from sklearn.datasets import load_sample_images
from conftest import SMALL, child_env, python, torchrun, train
from mixmix_nb import latents as L
from mixmix_nb.config import main
from mixmix_nb.core import StepRandoms, UserError
from mixmix_nb.data import Part
from mixmix_nb.datasets import open_data
from mixmix_nb.train import train as train_function
from mixmix_nb.vae import VAE, load_vae, measure

SIZE, SHARD, N = 32, 6, 21          # pixels, images per shard, images: four shards, the last one shorter
ONE = dict(OMP_NUM_THREADS=1)       # the last bit of a sum depends on the number of threads

def tree(folder): # dict of bytes by name; the lock stays behind and is empty
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name!='.lock'}

def options(home, folder, **changes): # arguments of the command that encodes
    o = dict(data_path=home/'photos', out=folder, vae=home/'vae', image_size=SIZE, batch_size=4, shard_size=SHARD,
             num_workers=0)
    return [str(a) for k,v in (o | changes).items() for a in ('--'+k.replace('_', '-'), v)]

def encode(home, out, **kw): # the same in this process
    data, vae = open_data(str(home/'photos'), SIZE), load_vae(str(home/'vae'))
    return L.encode(data, vae, out, batch=4, shard_size=SHARD, **kw)

def refused(capsys, command, *args): # the one line that the command says before it exits with status 2
    with pytest.raises(SystemExit) as e: main(command, [*map(str, args)])
    out, err = capsys.readouterr()
    assert e.value.code==2 and len(err.splitlines())==1 and err.startswith('mixmix_nb: '), (e.value.code, out, err)
    return err

@pytest.fixture(scope='module')
def home(tmp_path_factory): # a folder
    "It holds photos/, photos2/, vae/, vae2/, and whole/, the cache of an undisturbed encoding."
    import diffusers
    threads, d, photos = torch.get_num_threads(), tmp_path_factory.mktemp('latents'), load_sample_images().images
    torch.set_num_threads(1)
    for i in range(N):
        f = d/'photos'/'ab'[i%2]/f'{i:02d}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos[i%2][11*i:11*i+40, 20*i:20*i+44]).save(f)
    shutil.copytree(d/'photos', d/'photos2')
    Image.new('RGB', (40, 40)).save(d/'photos2'/'a'/'00.png')
    (d/'photos'/'b'/'05.png').write_bytes(b'not an image')
    for seed,name in enumerate(('vae', 'vae2')):
        torch.manual_seed(seed)
        diffusers.AutoencoderKL(block_out_channels=(8, 8, 8), norm_num_groups=4, mid_block_add_attention=False,
            down_block_types=('DownEncoderBlock2D',)*3, up_block_types=('UpDecoderBlock2D',)*3,
            scaling_factor=.7, shift_factor=.1).save_pretrained(d/name)
    r = python('-m', 'mixmix_nb.latents', *options(d, d/'whole'), cwd=d, **ONE)
    assert r.returncode==0 and f'{N} images as latents of 4×8×8' in r.stdout, r.stdout+r.stderr
    assert r.stdout.count('unreadable file')==1
    yield d
    torch.set_num_threads(threads)

# the command in forked processes; the n-th kills itself at its n-th operation on the cache, until one gets through;
# then ten of them with one folder
KILLED = '''
import os, signal, sys, traceback, diffusers, torch, mixmix_nb.latents as L
from diffusers import AutoencoderKL
from mixmix_nb.config import main
torch.set_num_threads(1)
out, *args = sys.argv[1:]
save, count, last, folder = L.save_file, 0, 0, ''
def touch(before_death=lambda: None):
    global count
    count += 1
    if count==last: before_death(), os.kill(os.getpid(), signal.SIGKILL)
def hook(event, a):
    if event in ('open', 'os.rename', 'os.mkdir') and folder and folder in str(a[0]): touch()
def torn(tensors, path, metadata):
    save(tensors, path, metadata=metadata)
    touch(lambda: os.truncate(path, os.path.getsize(path)//2))
def encode(name, n):
    global last, folder
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    last, folder, L.save_file = n, f'{out}/{name}', torn
    sys.addaudithook(hook)
    try: main('latents', [*args, '--out', folder])
    except SystemExit as e: os._exit(e.code)
    except BaseException: traceback.print_exc(), os._exit(1)
if args[0]=='again':
    args = args[1:]
    for name in sorted(os.listdir(out)): print(name, encode(name, 0), flush=True)
else:
    n = 1
    while (status := encode(f'{n:02d}', n))==-signal.SIGKILL: n += 1
    print(n-1, 'kills, then status', status, '; in a row:', [encode('row', n) for n in range(5, 15)])
'''

@pytest.mark.timeout(300)
def test_killed_anywhere(home, tmp_path, say):
    args = [a for a in options(home, '') if a not in ('--out', '')]
    r = python('-c', KILLED, tmp_path, *args, cwd=home, **ONE)
    kills = int(r.stdout.splitlines()[-1].split()[0]) if 'then status 0' in r.stdout else 0
    assert kills>=15 and r.stdout.count('-9')>=5, r.stdout+r.stderr
    whole, states = tree(home/'whole'), set()
    for d in tmp_path.iterdir():
        states.add(tuple(tree(d)))
        for name,data in tree(d).items(): assert name.endswith('.tmp') or data==whole[name], f'{d.name}/{name} is torn'
    assert len(states)>=8, states
    r = python('-c', KILLED, tmp_path, 'again', *args, cwd=home, **ONE)
    wrong = [l for l in r.stdout.splitlines() if l[0] in '0123456789r' and l[-2:]!=' 0']
    assert r.returncode==0 and not wrong, (wrong, r.stderr[-2000:])
    for d in tmp_path.iterdir(): assert tree(d)==whole, d.name
    say(f'encoding killed at each of {kills} operations on its files, and ten times in a row: the same bytes')

HANG = '''
import time
from pathlib import Path
from mixmix_nb.vae import VAE
def moments(self, x, real=VAE.moments):
    if len(list(Path('out').glob('*.safetensors')))==2: time.sleep(600)
    return real(self, x)
VAE.moments = moments
'''
def test_a_second_encoder_is_refused_and_a_killed_command_continues(home, tmp_path):
    (tmp_path/'hang.py').write_text(HANG)
    command = [sys.executable, '-m', 'mixmix_nb.latents', *options(home, 'out')]
    first = subprocess.Popen([*command, '--plugin', 'hang'], cwd=tmp_path, env=child_env(**ONE))
    end = time.monotonic()+100
    while not (tmp_path/'out'/'latents_00001.safetensors').exists() and time.monotonic()<end: time.sleep(.02)
    before = tree(tmp_path/'out')
    r = python(*command[1:], cwd=tmp_path, **ONE)
    assert r.returncode==2 and r.stderr=='mixmix_nb: another process is encoding into out\n', r.stderr
    assert first.poll() is None and tree(tmp_path/'out')==before
    first.send_signal(signal.SIGKILL)
    first.wait()
    r = python(*command[1:], cwd=tmp_path, **ONE)
    assert r.returncode==0 and r.stdout.count('encoded shard')==2, r.stdout+r.stderr
    assert tree(tmp_path/'out')==tree(home/'whole')

def test_two_processes_write_what_one_writes(home, tmp_path):
    for again in (False, True):                     # the second time two shards are left
        r = torchrun(2, '-m', 'mixmix_nb.latents', *options(home, 'out'), cwd=tmp_path)
        assert r.returncode==0 and r.stdout.count('train on them')==1, r.stdout+r.stderr[-3000:]
        assert tree(tmp_path/'out')==tree(home/'whole')
        for f in ('index.json', 'latents_00001.safetensors', 'latents_00003.safetensors'): (tmp_path/'out'/f).unlink()
    r = torchrun(2, '-m', 'mixmix_nb.latents', *options(home, home/'vae'), cwd=tmp_path)
    assert r.returncode==1 and 'mixmix_nb: --out' in r.stderr and '[rank1]' not in r.stderr, r.stderr[-3000:]

@pytest.mark.parametrize('changes,words', [
    (dict(data_path='photos2'), 'other latents (images: '), (dict(image_size=64), 'image size: 32 there, 64 now'),
    (dict(vae='vae2'), 'other latents (autoencoder: '), (dict(flip='off'), 'flip: True there, False now'),
    (dict(shard_size=7), 'shard_size: 6 there, 7 now'), (dict(out='photos'), 'is not empty and holds no latents'),
    (dict(out='vae/config.json'), 'config.json'), (dict(out='app'), 'choose another folder'),
    (dict(out='list'), 'choose another folder'), (dict(vae='nowhere'), '--vae nowhere'),
    (dict(image_size=30), '--image-size 30 is not divisible by 4')])
def test_wrong_folders_are_refused(home, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(home)
    for name,text in (('app', '{"name": "an app"}'), ('list', '[1]')):  # manifest.json is a name that others use, too
        (home/name).mkdir(exist_ok=True)
        (home/name/'manifest.json').write_text(text)
    look = lambda: {f: (f.stat().st_mtime_ns, f.read_bytes() if f.is_file() else 0) for f in home.rglob('*')}
    before = look()
    assert words in refused(capsys, 'latents', *options(Path(), 'whole', **changes))
    assert look()==before, 'nothing may be written'

def damage(home, cache, how):
    shard = cache/'latents_00001.safetensors'
    data = shard.read_bytes()
    if how=='incomplete': (cache/'index.json').unlink()
    if how=='missing': shard.unlink()
    if how=='short': shutil.copy(cache/'latents_00003.safetensors', shard)
    if how=='other': shutil.copy(encode(home, cache.with_name('mean'), mean_only=True)/shard.name, shard)
    new = dict(truncated=data[:-100], empty=b'', zeros=bytes(len(data)), longer=data+b'0').get(how)
    if new is not None: shard.write_bytes(new)

@pytest.mark.parametrize('how', ['incomplete', 'missing', 'truncated', 'empty', 'zeros', 'longer', 'short', 'other'])
def test_a_damaged_cache_is_refused_and_can_be_repaired(home, tmp_path, capsys, how):
    cache, results = tmp_path/'whole', tmp_path/'results'
    shutil.copytree(home/'whole', cache)
    damage(home, cache, how)
    line = refused(capsys, 'train', *SMALL, '--steps', 1, '--data-path', cache, '--results-dir', results)
    what = 'are not complete' if how=='incomplete' else 'latents_00001.safetensors in'
    assert what in line and 'run the command that encodes again' in line and not results.exists()
    assert tree(encode(home, cache))==tree(home/'whole'), 'what the message says must help'

def test_training_needs_neither_images_nor_autoencoder(home, tmp_path):
    shutil.copytree(home/'whole', tmp_path/'cache')
    away = home.rename(home.with_name('away'))
    more = '--data-path', 'cache', '--steps', 3, '--num-sample-images', 4, '--val-fraction', .2
    try: r = train(*SMALL, *more, cwd=tmp_path)
    finally: away.rename(home)
    assert 'no previews: ' in r.stdout and f'latents of {home/"vae"}' in r.stdout, r.stdout
    assert list(tmp_path.glob('results/*/checkpoints/final.pt'))

@pytest.mark.parametrize('mean_only', [False, True])
def test_the_same_latents_with_and_without_cache(home, tmp_path, mean_only):
    loop = L.EncodedData(open_data(str(home/'photos'), SIZE), load_vae(str(home/'vae')))
    cache = L.open_cache(encode(home, tmp_path/'cache', mean_only=mean_only))
    held = cache.in_memory(torch.device('cpu'), 2**30)
    assert cache.fingerprint()==loop.fingerprint() and cache.info==loop.info and type(held) is not L.LatentData
    i = [j for j in range(N) if '05.png' not in loop.name_of(j)]
    rand = StepRandoms(0, 1, 0, len(i), cache.info.shape)
    x = torch.stack([loop[j][0] for j in i])
    mean = torch.stack(loop.vae.moments(torch.where((rand.flip<.5)[:,None,None,None], x.flip(-1), x)/127.5-1))[0]
    want = mean if mean_only else loop.to_model(x, True, rand)
    assert mean_only or (want-mean).std()>.01, 'there is a posterior to sample from'
    part = Part(cache, torch.tensor(i))
    for data,batch in ((cache, cache.batch(i)), (held, held[torch.tensor(i)]), (part, part.batch(range(len(i))))):
        assert (data.to_model(batch[0], True, rand)-want).abs().max()<2e-3*want.abs().max()
        assert batch[1].tolist()==[int(loop[j][1]) for j in i]

def test_training_in_the_loop_and_from_the_cache(home, tmp_path, monkeypatch):
    "The same losses; --cache-latents encodes once; a run that began in the loop goes on from the cache."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MIXMIX_CACHE', str(tmp_path/'caches'))
    same = dict(model='DiT-N/8', batch_size=12, num_sample_images=0, num_workers=0, log_every=1, lr=1e-3)
    photos = dict(data_path=str(home/'photos'), vae=str(home/'vae'), image_size=SIZE)
    def losses(run): return [float(r['loss']) for r in csv.DictReader(open(run/'metrics.csv'))]
    loop = train_function(**same, **photos, steps=4)
    want = losses(loop)
    for k in range(2):
        assert losses(train_function(**same, **photos, cache_latents=True, steps=4))==pytest.approx(want, rel=2e-3)
        index, = (tmp_path/'caches').rglob('index.json')
        assert k==0 or index.stat().st_mtime_ns==written
        written = index.stat().st_mtime_ns
    assert losses(train_function(resume=str(loop), data_path=str(home/'whole'), steps=5))[:4]==want

def test_measured_statistics_are_used(home, tmp_path):
    before = tree(home/'vae')
    r = python('-m', 'mixmix_nb.latents', '--measure', *options(home, tmp_path/'new'), cwd=tmp_path, **ONE)
    assert r.returncode==0 and 'with statistics' in r.stdout and tree(home/'vae')==before, r.stdout+r.stderr
    old, new, data = load_vae(str(home/'vae')), load_vae(str(tmp_path/'new')), open_data(str(home/'photos'), SIZE)
    x = torch.stack([data[i][0] for i in range(N) if '05.png' not in data.name_of(i)])/127.5-1
    mean, std = new.moments(torch.cat([x, x[:1]]))              # roughly: the unreadable file's stand-in differs
    assert mean.mean((0, 2, 3)).abs().max()<.1 and ((mean**2+std**2).mean((0, 2, 3))-1).abs().max()<.1
    assert (old.moments(x)[0].mean((0, 2, 3)).abs()>.1).any() and new.fingerprint()!=old.fingerprint()
    assert (new.decode(new.moments(x)[0])-old.decode(old.moments(x)[0])).abs().max()<1e-4, 'the same autoencoder'

def test_representation_autoencoder(monkeypatch):
    "AutoencoderRAE normalises by itself, takes [0,1] and has one size. Its encoder is of transformers: a stand-in here."
    import diffusers
    if not hasattr(diffusers, 'AutoencoderRAE'): pytest.skip('diffusers has no AutoencoderRAE')
    from diffusers.models.autoencoders import autoencoder_rae as rae
    monkeypatch.setattr(rae, '_build_encoder', lambda hidden_size, patch_size, **kw:
                        torch.nn.Conv2d(3, hidden_size, patch_size, patch_size))
    monkeypatch.setitem(rae._ENCODER_FORWARD_FNS, 'dinov2', lambda net, x: net(x).flatten(2).mT)
    torch.manual_seed(0)
    model = rae.AutoencoderRAE(encoder_hidden_size=8, encoder_patch_size=7, encoder_input_size=28, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, scaling_factor=.8,
        decoder_intermediate_size=16, latents_mean=torch.randn(8, 1, 1), latents_std=torch.rand(8, 1, 1)+.5)
    vae, x = VAE(model, 'rae'), torch.rand(2, 3, 32, 32)*2-1
    z = model.encode((x+1)/2).latent
    assert (vae.channels, vae.factor, vae.size, vae.has_posterior)==(8, 8, 32, False)
    assert torch.equal(vae.moments(x)[0], z) and torch.equal(vae.decode(z), (model.decode(z).sample*2-1).clamp(-1, 1))
    with pytest.raises(UserError, match='--image-size 32'): vae.latent_size(64)
    with pytest.raises(UserError, match='nothing to measure'): measure([], vae, 'nowhere')

@pytest.mark.parametrize('changes,words', [
    (dict(vae='video'), 'only autoencoders of images can be used'),
    (dict(vae='unet'), 'UNet2DModel, not an autoencoder'), (dict(vae='half'), 'must have 4 values each'),
    (dict(data_path='empty'), 'no images'), (dict(out='vae2'), 'exists'), (dict(vae='photos'), 'could not be loaded')])
def test_what_cannot_be_measured_is_refused(home, tmp_path, monkeypatch, capsys, changes, words):
    import diffusers
    monkeypatch.chdir(tmp_path)
    small = dict(block_out_channels=(8, 8), layers_per_block=1)
    diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32,), layers_per_block=1).save_pretrained('video')
    diffusers.UNet2DModel(**small, norm_num_groups=4, down_block_types=('DownBlock2D',)*2,
                          up_block_types=('UpBlock2D',)*2).save_pretrained('unet')
    for name in ('photos', 'vae', 'vae2'): (tmp_path/name).symlink_to(home/name)
    (tmp_path/'empty').mkdir()
    half = shutil.copytree(home/'vae', tmp_path/'half')
    config = json.loads((half/'config.json').read_text()) | dict(latents_std=[1.]*3)
    (half/'config.json').write_text(json.dumps(config))
    before = sorted(tmp_path.rglob('*'))
    assert words in refused(capsys, 'latents', '--measure', *options(Path(), 'new', **changes))
    assert sorted(tmp_path.rglob('*'))==before, 'nothing may be written'

MEMORY = '''
import os, resource, sys, torch, mixmix_nb.latents as L
from mixmix_nb.data import TensorData
from mixmix_nb.images import DataInfo
def used(): # MB; ru_maxrss of Linux counts what the parent had, too
    if sys.platform=='linux': return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
class Wide:                         # one megabyte per image and side
    name, channels, fingerprint, latent_size = 'wide', 16, lambda self: '', lambda self, size: 128
    def moments(self, x): return (x.new_ones(len(x), 16, 128, 128),)*2
info, mb = DataInfo('zeros', (3, 8, 8), flip=True), []
data = TensorData(torch.zeros(400, 3, 8, 8, dtype=torch.uint8), torch.zeros(400), info)
L.encode(data, Wide(), sys.argv[1], batch=4, shard_size=8, between=lambda: mb.append(used()))
print('grown by', max(mb)-mb[10])
'''
def test_memory_stays_flat_while_encoding(tmp_path):
    r = python('-c', MEMORY, tmp_path/'cache', cwd=tmp_path)
    assert r.returncode==0 and float(r.stdout.split()[-1])<100, f'MB, of 740 encoded: {r.stdout[-200:]}{r.stderr}'

def test_a_dry_run_encodes_nothing(home, tmp_path, monkeypatch, capsys):
    "Not without a cache, nor beside one that lacks a shard; it refuses what the run would refuse."
    monkeypatch.setenv('MIXMIX_CACHE', str(tmp_path))
    options = dict(data_path=str(home/'photos'), vae=str(home/'vae'), image_size=SIZE, cache_latents=True, model='DiT-N/4', num_workers=0,
                   num_sample_images=0, steps=2, batch_size=4, results_dir=str(tmp_path/'runs'))
    def plans_encoding(): return train_function(**options, dry_run=True)['encoding']>0
    assert plans_encoding() and not (tmp_path/'latents').exists()
    train_function(**options)
    cache, = (tmp_path/'latents').iterdir()
    assert not plans_encoding()
    next(cache.glob('*.safetensors')).unlink()
    assert plans_encoding() and not list(cache.glob('*.safetensors'))
    options['vae'] = str(home/'vae2')
    with pytest.raises(UserError, match='holds other latents .autoencoder'): train_function(**options, dry_run=True)
