"The cache of latents: killed anywhere, shared by processes, torn, mistaken for another one, larger than memory; and the same numbers with it and without it."
import json, os, random, re, shutil, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from conftest import child_env, forked, python
from mixmix_nb import latents as L
from mixmix_nb.core import RunError, UserError, draws
from mixmix_nb.data import MemoryData, open_data

SIZE, SHARD, N = 32, 8, 61          # pixels, pictures a shard, pictures: the last shard is a short one

def tiny_model(cls='AutoencoderKL'):
    import diffusers
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(8,8,8), norm_num_groups=4, mid_block_add_attention=False, scaling_factor=.7, shift_factor=.1,
        down_block_types=('DownEncoderBlock2D',)*3, up_block_types=('UpDecoderBlock2D',)*3)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Sums of floats depend on how many threads share them, to the last bit; here as in the child processes there is one."
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def stuff(tmp_path_factory):
    "A folder with `photos/` (three classes, two broken files), `vae/`, and `whole/`, the cache made without disturbance."
    from PIL import Image
    from sklearn.datasets import load_sample_images
    d, rng, photos = tmp_path_factory.mktemp('latents'), random.Random(0), load_sample_images().images
    for i in range(N):
        f = d/'photos'/'abc'[i%3]/f'{i:03d}.jpg'; f.parent.mkdir(parents=True, exist_ok=True)
        y, x = rng.randrange(380), rng.randrange(590)
        Image.fromarray(photos[i%2][y:y+40, x:x+44]).save(f, quality=90)
    for i in (3, 4): (d/'photos'/'abc'[i%3]/f'{i:03d}.jpg').write_bytes(b'no picture')
    tiny_model().save_pretrained(d/'vae')
    L.encode(open_data(d/'photos', SIZE), L.load_vae(d/'vae'), d/'whole', batch=4, workers=0, shard=SHARD)
    return d

def again(d, out, **kw): return L.encode(open_data(d/'photos', SIZE), L.load_vae(d/'vae'), out, **dict(batch=4, workers=0, shard=SHARD) | kw)
def tree(d): return {p.name: p.read_bytes() for p in sorted(Path(d).iterdir())}
def options(d, out): return ['--data-path', d/'photos', '--out', out, '--vae', d/'vae', '--image-size', SIZE, '--batch-size', 4, '--shard-size', SHARD, '--num-workers', 0]

# ---- killed

MORTAL = '''
import builtins, json, os, signal, sys
from pathlib import Path
import torch; torch.set_num_threads(1)
from mixmix_nb import core, latents as L
from mixmix_nb.data import open_data
d, spec = Path(sys.argv[1]), json.loads(sys.argv[2])
data, vae = open_data(d/'photos', 32), L.load_vae(d/'vae')
data[0]                                                             # imports the decoder
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
EVENTS = {'open', 'os.rename', 'os.remove', 'os.mkdir'}

class Torn:
    "An open file that kills the process in the middle of a write, when its turn comes."
    def __init__(self, f): self.f = f
    def write(self, b):
        global count
        count += 1
        if count==last: b = memoryview(b).cast('B'); self.f.write(b[:len(b)//2]); self.f.flush(); die()
        return self.f.write(b)
    def __getattr__(self, k): return getattr(self.f, k)
    def __enter__(self): return self
    def __exit__(self, *a): return self.f.__exit__(*a)

def hook(event, args):
    global count
    if event not in EVENTS or inside not in str(args[0]): return
    count += 1
    if count==last: die()

def attempt(out, at):
    "encode(), in a process of its own, killed at its `at`-th operation on a file of the cache (0: never): its status, and how many operations there were."
    r, w = os.pipe()
    pid = os.fork()
    if pid==0:
        global count, last, inside
        count, last, inside = 0, at, str(out)
        core.open = L.open = lambda p, mode='r', *a: Torn(builtins.open(p, mode, *a)) if 'wb'==mode else builtins.open(p, mode, *a)
        sys.addaudithook(hook)
        try: L.encode(data, vae, out, batch=4, workers=0, shard=8)
        except BaseException as e: print(repr(e), file=sys.stderr, flush=True); os._exit(1)
        os.write(w, str(count).encode()); os._exit(0)
    os.close(w); n = os.read(r, 100); os.close(r)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(n or 0)

print('RESULT', json.dumps([attempt(Path(out), at) for out,at in spec]))
'''

def attempts(d, spec):
    r = forked('-c', MORTAL, d, json.dumps(spec))
    assert r.returncode==0, r.stderr
    return json.loads(r.stdout.split('RESULT')[1]), r.stderr

@pytest.mark.timeout(300)
def test_killed_anywhere(stuff, tmp_path, say):
    "Ten encodings killed at a random operation each and started again, then one killed ten times in a row: the same files, byte for byte."
    [[status, total]], err = attempts(stuff, [(str(tmp_path/'a'), 0)])
    assert status==0 and total>60, err
    rng = random.Random('kill')
    at = [rng.randrange(total*i//10, total*(i+1)//10)+1 for i in range(10)]
    result, err = attempts(stuff, [(str(tmp_path/f'k{i}'), at[i]) for i in range(10)] + [(str(tmp_path/'row'), rng.randrange(5, 25)) for _ in range(10)])
    assert [s for s,_ in result[:10]]==[-9]*10 and [s for s,_ in result[10:]].count(-9)>=5, (result, err)
    whole = tree(stuff/'whole')
    for d in (*tmp_path.glob('k*'), tmp_path/'row'):                # what bears its name is whole, at any moment
        for name,data in tree(d).items(): assert name.endswith('.tmp') or name in ('.lock', 'plan.json') or data==whole[name], (d.name, at, name)
    result, err = attempts(stuff, [(str(tmp_path/name), 0) for name in ['row', *(f'k{i}' for i in range(10))]])
    assert all(s==0 for s,_ in result), (result, err)
    for name in ['a', 'row', *(f'k{i}' for i in range(10))]: assert tree(tmp_path/name)==tree(stuff/'whole'), (name, at)
    say(f'encoding killed at operations {at} of {total}, and ten times in a row: the same bytes')

# ---- several processes

WATCH = '''
import os, sys
from mixmix_nb import latents as L
real = L.write_parts
def write_parts(path, parts):
    with open(f'{sys.argv[1]}.{os.environ["RANK"]}', 'a') as f: f.write(path.name+'\\n')
    real(path, parts)
L.write_parts = write_parts
L.main(sys.argv[2:])
'''

def test_two_processes_share_the_shards(stuff, tmp_path):
    "Under torchrun each process writes its own shards, no file is written by two, and the bytes are those of one process. The second start does nothing."
    (tmp_path/'w.py').write_text(WATCH)
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', tmp_path/'w.py', tmp_path/'log', *options(stuff, tmp_path/'cache')]
    r = subprocess.run([*map(str, cmd)], env=child_env(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=200)
    assert r.returncode==0, r.stderr[-3000:]
    wrote = [(tmp_path/f'log.{i}').read_text().split() for i in (0, 1)]
    for i in (0, 1): assert [f for f in wrote[i] if f.startswith('shard')]==[f'shard-{k:05d}.safetensors' for k in range(i, 8, 2)]
    assert not set(wrote[0]) & set(wrote[1]) and wrote[0][-1]=='cache.json'
    assert tree(tmp_path/'cache')==tree(stuff/'whole')

def test_waiting_for_a_dead_process_ends(stuff, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.setenv('RANK', '0')
    with pytest.raises(RunError, match='waited 0 s for the shards of other processes'): again(stuff, tmp_path/'c', patience=.3)
    assert not (tmp_path/'c/cache.json').exists() and len(list((tmp_path/'c').glob('shard-*')))==4
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(RunError, match='waited 0 s for the first process to begin'): again(stuff, tmp_path/'c', patience=.3)
    assert len(list((tmp_path/'c').glob('shard-*')))==4
    monkeypatch.setenv('WORLD_SIZE', '1'); monkeypatch.setenv('RANK', '0')
    again(stuff, tmp_path/'c')
    assert tree(tmp_path/'c')==tree(stuff/'whole')

def test_a_second_command_is_refused(stuff, tmp_path):
    shutil.copytree(stuff/'whole', tmp_path/'c'); L.shard_path(tmp_path/'c', 0).unlink()
    with L.claimed(tmp_path/'c'), pytest.raises(UserError, match='in use by another process'): again(stuff, tmp_path/'c')

class Other:
    "`again` in a child process that is the second of two, and what it says when it leaves."
    def __init__(self, stuff, out, patience=20):
        r, w = os.pipe(); self.pid, self.said = os.fork(), None
        if self.pid==0:
            os.environ.update(RANK='1', WORLD_SIZE='2')
            try: again(stuff, out, patience=patience); os.write(w, b'done')
            except BaseException as e: os.write(w, f'{type(e).__name__}: {e}'.encode())
            os._exit(0)
        os.close(w); self.pipe = r
    def living(self):
        if self.said is None and os.waitpid(self.pid, os.WNOHANG)[0]: self.said = os.read(self.pipe, 10000).decode(); os.close(self.pipe)
        time.sleep(.02)
        return self.said is None

def half(stuff, out):
    "A cache that was begun: the plan, and no shard."
    out.mkdir(); L.begin(out, L.plan_cache(open_data(stuff/'photos', SIZE), L.load_vae(stuff/'vae'), shard=SHARD), open_data(stuff/'photos', SIZE))

def beat(claim): claim.last = -1e9; claim.beat()

@pytest.mark.timeout(60)
def test_the_others_do_nothing_beside_another_command(stuff, tmp_path):
    "While another command holds the folder and lives, the second process of a start leaves, and writes nothing."
    half(stuff, tmp_path/'c')
    with L.claimed(tmp_path/'c') as claim:
        other = Other(stuff, tmp_path/'c')
        while other.living(): beat(claim)
    assert 'UserError' in other.said and 'in use by another process' in other.said
    assert not list((tmp_path/'c').glob('shard-*')) and not list((tmp_path/'c').glob('.rank-*'))

@pytest.mark.timeout(60)
def test_the_others_leave_with_the_first(stuff, tmp_path, monkeypatch):
    "The second process does its shards once the first holds the folder, and leaves when the first goes without an end; the first leaves when another has failed."
    for k,v in (('RANK', '0'), ('WORLD_SIZE', '2')): monkeypatch.setenv(k, v)
    half(stuff, tmp_path/'c')
    (tmp_path/'c/.lock').write_text(f'{L.start_name()} busy')       # of a start with the same name, that was killed
    other = Other(stuff, tmp_path/'c')
    for _ in range(20): assert other.living()
    assert not list((tmp_path/'c').glob('shard-*'))
    with L.claimed(tmp_path/'c') as claim:
        while not claim.all_done(): beat(claim); assert other.living()
        assert sorted(f.name for f in (tmp_path/'c').glob('shard-*'))==[f'shard-{k:05d}.safetensors' for k in range(1, 8, 2)]
        (tmp_path/'c/.rank-1').write_text(f'{claim.start} failed')
        with pytest.raises(RunError, match='process 1 has failed'): claim.all_done()
    while other.living(): pass
    assert 'RunError' in other.said and 'the first process has ended' in other.said

# ---- memory that does not do, pictures that cannot be read

def test_less_memory_than_a_batch_needs(stuff, tmp_path, monkeypatch, capsys):
    "A batch is halved until it fits; where one picture does not, one line says so."
    real, most, asked = L.VAE.moments, 3, []
    def moments(self, x):
        asked.append(len(x))
        if len(x)>most: raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate much')
        return real(self, x)
    monkeypatch.setattr(L.VAE, 'moments', moments)
    c, whole = L.open_cache(again(stuff, tmp_path/'c', batch=8)), L.open_cache(stuff/'whole')
    assert asked[:3]==[8, 4, 2] and max(asked[3:])==2
    assert (c.gather(torch.arange(N)).float()-whole.gather(torch.arange(N)).float()).abs().max()<5e-3
    most = 0
    with pytest.raises(RunError, match='no memory on cpu to encode one picture of 32 pixels'): again(stuff, tmp_path/'d')
    with pytest.raises(SystemExit) as e: L.main([*map(str, options(stuff, tmp_path/'d'))])
    err = capsys.readouterr().err
    assert e.value.code==1 and err.startswith('mixmix_nb: no memory on cpu') and err.count('\n')==1, err
    assert not list((tmp_path/'d').glob('shard-*')) and not (tmp_path/'d/cache.json').exists()

@pytest.mark.parametrize('workers', [0, 1])
def test_no_memory_to_decode(stuff, tmp_path, monkeypatch, capsys, workers):
    "Where memory does not do for one picture, the picture does not count as broken: one line, and nothing is kept."
    import torchvision.io
    def decode_jpeg(*args, **kw): raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    monkeypatch.setattr(torchvision.io, 'decode_jpeg', decode_jpeg)
    with pytest.raises(SystemExit) as e: L.main([*map(str, options(stuff, tmp_path/'c')[:-1]), str(workers)])
    err = capsys.readouterr().err
    assert e.value.code==1 and err.count('\n')==1 and re.search(r'^mixmix_nb: no memory to decode .*000\.jpg$', err.strip()), err
    assert not (tmp_path/'c').exists()
    data = open_data(stuff/'photos', SIZE)
    with pytest.raises(RunError, match=r'^no memory to decode .*000\.jpg$'): next(L.picture_batches(data, [range(2)], workers))
    with pytest.raises(RunError, match=r'^no memory to decode \S*jpg$'): next(data.batches(0, 2, 0, 1, workers=workers))
    assert not data.known_bad & {0}

def touched(stuff, i, change, **kw):
    "The autoencoder, with the parameters of one picture's posterior (8,h,w) changed."
    from types import SimpleNamespace as S
    vae, x = L.load_vae(stuff/'vae', **kw), open_data(stuff/'photos', SIZE)[i][0].float()/127.5-1
    real = vae.model.encode
    def encode(v):
        p = real(v).latent_dist.parameters.clone()
        for q,w in zip(p, v):
            if torch.equal(w, x): change(q)
        return S(latent_dist=S(parameters=p))
    vae.model.encode = encode
    return vae

@pytest.mark.parametrize('what', ['nan', 'too large', 'too small', 'variance', 'mirrored'])
@pytest.mark.parametrize('i,name', [(30, 'b/028.jpg'), (1, 'a/006.jpg')])      # a/003.jpg is broken, and the next one stands in for it
def test_not_finite_is_not_kept(stuff, tmp_path, what, i, name):
    "Numbers that are not finite in fp16 end the work before their shard is written, and name the picture; a sound autoencoder goes on from there."
    def change(q):
        if what=='nan': q[0,2,3] = torch.nan
        if what=='too large': q[1,0,0] = 2e5                        # finite, but not in fp16
        if what=='too small': q[1,0,0] = -torch.inf
        if what in ('variance', 'mirrored'): q[6,1,1] = torch.inf   # a clamp would make a number of it
    data, vae = open_data(stuff/'photos', SIZE), touched(stuff, i, change)
    if what=='mirrored':
        real = vae.model.encode; vae.model.encode = lambda v: real(v.flip(-1))
    with pytest.raises(RunError, match=f'not finite as fp16 for {name}') as e: L.encode(data, vae, tmp_path/'c', batch=4, workers=0, shard=SHARD)
    assert '\n' not in str(e.value) and not (tmp_path/'c/cache.json').exists()
    assert sorted(f.name for f in (tmp_path/'c').glob('shard-*'))==[f'shard-{k:05d}.safetensors' for k in range(i//SHARD)]
    if what=='mirrored': return
    again(stuff, tmp_path/'c')
    assert tree(tmp_path/'c')==tree(stuff/'whole')

def test_fp16_overflow_inside_is_computed_again(stuff):
    "What overflows inside the encoder in fp16 is computed once more in fp32, and is right."
    vae, x = L.load_vae(stuff/'vae', dtype=torch.float16), torch.rand(2, 3, SIZE, SIZE)*2-1
    want, real, loud = L.load_vae(stuff/'vae').moments(x), vae.model.encode, torch.eye(3)[:,:,None,None]*1e6
    seen = []
    def encode(v): v = torch.nn.functional.conv2d(v, loud); seen.append(bool(v.isfinite().all())); return real(torch.nn.functional.conv2d(v, loud/1e12))
    vae.model.encode = encode
    for a,b in zip(vae.moments(x), want): assert torch.allclose(a, b, atol=1e-3)
    assert seen==[False, True]

def test_lines_from_time_to_time(stuff, tmp_path, monkeypatch, capsys):
    "Within a shard, too, and with what would take less room."
    monkeypatch.setattr(L.telling, '__defaults__', (0,))
    again(stuff, tmp_path/'c', shard=1024)
    said = capsys.readouterr().out
    assert said.count(f' of {N}: ')>10 and re.search(r'--no-flip takes .* MB, --mean-only .* MB', said)

# ---- torn, mistaken, refused

@pytest.mark.parametrize('how', ['cut', 'empty', 'missing', 'head', 'bit', 'renamed', 'other cache'])
def test_torn_shard_is_redone(stuff, tmp_path, how):
    out = tmp_path/'c'; shutil.copytree(stuff/'whole', out)
    s = L.shard_path(out, 2); data = s.read_bytes()
    if how=='missing': s.unlink()
    elif how=='renamed': L.shard_path(out, 7).replace(s)
    elif how=='other cache': L.encode(open_data(stuff/'photos', SIZE), L.load_vae(stuff/'vae'), tmp_path/'o', False, batch=4, workers=0, shard=SHARD); shutil.copy(L.shard_path(tmp_path/'o', 2), s)
    else: s.write_bytes(dict(cut=data[:-1], empty=b'', head=data[:20]+b'?'+data[21:], bit=data[:-90]+bytes([data[-90]^1])+data[-89:])[how])
    if how!='bit':
        with pytest.raises(UserError, match='shard-00002') as e: L.open_cache(out)
        assert '\n' not in str(e.value)
    again(stuff, out, verify=how=='bit')
    assert tree(out)==tree(stuff/'whole')

def test_another_cache_is_refused(stuff, tmp_path):
    "Another VAE, size, set of files, kind: each refused with its reason, and nothing is changed."
    out = tmp_path/'c'; shutil.copytree(stuff/'whole', out)
    data, vae, model = open_data(stuff/'photos', SIZE), L.load_vae(stuff/'vae'), tiny_model()
    model.encoder.conv_in.bias.data[0] += 1
    small = open_data(stuff/'photos', SIZE).subset(torch.arange(1, N))
    for args,kw,why in (((data, L.VAE(model)), {}, 'another VAE'), ((open_data(stuff/'photos', 64), vae), {}, '--image-size: 32 there, 64 here'), ((small, vae), {}, 'other files'),
                        ((data, vae), dict(flip=False), '--no-flip'), ((data, vae), dict(mean_only=True), '--mean-only')):
        with pytest.raises(UserError, match=why): L.encode(*args, out, **kw)
    shutil.copytree(stuff/'photos', tmp_path/'photos')              # the same names, another picture, in another place
    assert L.plan_cache(open_data(tmp_path/'photos', SIZE), vae)==L.plan_cache(data, vae)
    f = tmp_path/'photos/a/030.jpg'; f.write_bytes(f.read_bytes()[:-30]+bytes(30))
    with pytest.raises(UserError, match='other pictures in files of the same names'): L.encode(open_data(tmp_path/'photos', SIZE), vae, out)
    assert L.EncodedData(open_data(tmp_path/'photos', SIZE), vae).fingerprint()!=L.open_cache(out).fingerprint()
    with pytest.raises(UserError, match='no latent cache'): L.encode(data, vae, stuff/'photos')
    assert tree(out)==tree(stuff/'whole')

def test_a_replaced_vae_is_noticed(stuff, tmp_path):
    shutil.copytree(stuff/'vae', tmp_path/'vae'); first = L.load_vae(tmp_path/'vae').fingerprint()
    assert first==L.load_vae(stuff/'vae').fingerprint()
    model = tiny_model(); model.decoder.conv_out.weight.data *= 1.001; model.save_pretrained(tmp_path/'vae')
    assert L.load_vae(tmp_path/'vae').fingerprint()!=first

def test_incomplete_is_not_opened(stuff, tmp_path):
    out = tmp_path/'c'; shutil.copytree(stuff/'whole', out); (out/'cache.json').unlink()
    with pytest.raises(UserError, match='no latent cache'): L.open_cache(out)
    assert not L.is_cache(out) and not L.is_cache(stuff/'photos') and not L.is_cache(tmp_path/'x') and L.is_cache(stuff/'whole')
    plan = json.loads((stuff/'whole/cache.json').read_text())
    lacking = [json.dumps({k: v for k,v in plan.items() if k!=gone}) for gone in ('images', 'shard', 'classes', 'flip')]
    for text in ('{', '[]', '"x"', *lacking, json.dumps(plan | dict(images='x')), json.dumps(plan | dict(shard=0)), json.dumps(plan | dict(shape=[4, 'a', 8]))):
        (out/'cache.json').write_text(text)
        with pytest.raises(UserError): L.open_cache(out)

def test_no_room(stuff, tmp_path, monkeypatch):
    monkeypatch.setattr(L.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9-10**5, 10**5))
    with pytest.raises(UserError, match='--no-flip takes .*--mean-only'): again(stuff, tmp_path/'c')
    assert not (tmp_path/'c').exists()

BAD = [('', '--data-path'), ('--data-path photos', '--out'), ('--data-path nowhere --out o --vae vae', 'neither a folder nor'), ('--data-path photos --out o --vae none', 'nothing to encode'),
       ('--data-path photos --out o --vae nothing', 'neither a folder'), ('--data-path photos --out o --vae photos', 'no AutoencoderKL'), ('--data-path photos --out o --vae ema', '--vae none'),
       ('--data-path photos --out o --vae someone/something', 'TAESD'), ('--data-path photos --out o --vae vae --image-size 66', 'divisible by 4'), ('--data-path photos --out photos/a/o --vae vae', 'lies in'),
       ('--data-path photos --out o --vae vae --image-size 0', 'at least 1'), ('--data-path photos --out o --vae vae --batch-size 0', 'at least 1'), ('--data-path photos --out o --vae vae --num-workers -1', 'at least 0'),
       ('--data-path photos --out vae --vae vae --image-size 32', 'no latent cache'), ('--data-path photos --out o --vae vae --device cuda:9', 'cuda:9'), ('--data-path photos --out o --nonsense', 'unknown option'),
       ('--data-path photos --out photos/a/000.jpg --vae vae', 'lies in'), ('--data-path photos --out o --vae torn --image-size 32', 'cannot be read'), ('--data-path photos --out o --vae half --image-size 32', 'lacks'),
       ('--data-path photos --out o --vae words --image-size 32', 'scaling_factor'), ('--data-path unread --out o --vae vae --image-size 32', 'not one picture')]

def test_bad_input(stuff, tmp_path, monkeypatch, capsys):
    "One line on stderr, status 2, nothing written."
    from safetensors.torch import load_file, save_file
    for n in ('photos', 'vae'): (tmp_path/n).symlink_to(stuff/n)
    for n in ('torn', 'half'): shutil.copytree(stuff/'vae', tmp_path/n)
    w = 'diffusion_pytorch_model.safetensors'
    shutil.copytree(stuff/'vae', tmp_path/'words'); c = tmp_path/'words/config.json'; c.write_text(json.dumps(json.loads(c.read_text()) | dict(scaling_factor='large')))
    (tmp_path/'unread').mkdir(); (tmp_path/'unread/a.jpg').write_bytes(b'no picture')
    (tmp_path/'torn'/w).write_bytes((stuff/'vae'/w).read_bytes()[:5000])
    save_file(dict(list(load_file(stuff/'vae'/w).items())[5:]), tmp_path/'half'/w)
    monkeypatch.chdir(tmp_path)
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True)
    for n,v in (('RANK', '0'), ('WORLD_SIZE', '1')): monkeypatch.setenv(n, v)
    before = sorted(p.name for p in tmp_path.rglob('*'))
    for line,why in BAD:
        with pytest.raises(SystemExit) as e: L.main(line.split())
        err = capsys.readouterr().err
        assert e.value.code==2 and err.startswith('mixmix_nb: ') and err.count('\n')==1 and why in err, (line, err)
    assert sorted(p.name for p in tmp_path.rglob('*'))==before

def test_command(stuff, tmp_path):
    "The command in a process of its own makes the same files with decoding workers; only what a user wants to read is printed."
    o = options(stuff, tmp_path/'c'); o[-1] = 2
    r = python('-m', 'mixmix_nb.latents', *o, OMP_NUM_THREADS='1')
    assert r.returncode==0 and r.stderr=='', r.stderr
    assert 'decoders could do' in r.stdout and '2 bad file(s)' in r.stdout and 'MB on the disk' in r.stdout
    assert tree(tmp_path/'c')==tree(stuff/'whole')
    assert (tmp_path/'c/bad_files.txt').read_text().split()==['a/003.jpg', 'b/004.jpg']

# ---- the same numbers

def loss_of(data, model, process, step):
    "The loss of one step, from what the data gives."
    x, y, _ = next(data.batches(5, 16, step, step+1))
    d = draws(5, step, 0, 16, data.shape)
    z = data.to_model(x, d.flip, 5, step)
    return process.loss(model, z, y, d)['loss'].mean().item()

@pytest.mark.parametrize('prediction', ['eps', 'x0'])
@pytest.mark.parametrize('kind', ['AutoencoderKL', 'TAESD'])
def test_same_loss_from_cache_and_on_the_fly(stuff, tmp_path, kind, prediction, request, say):
    from mixmix_nb.diffusion import Diffusion
    from mixmix_nb.models import DiT
    vae = L.load_vae(stuff/'vae' if kind=='AutoencoderKL' else request.getfixturevalue('data_dir')/'taesd')
    data = open_data(stuff/'photos', 64)
    mapped, live = L.open_cache(L.encode(data, vae, tmp_path/'c', workers=0, shard=16)), L.EncodedData(data, vae)
    held = L.open_cache(tmp_path/'c').to('cpu')
    assert live.fingerprint()==mapped.fingerprint()==held.fingerprint() and mapped.posterior==(kind=='AutoencoderKL')
    torch.manual_seed(0); model, process, worst = DiT(input_size=mapped.shape[1], patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=2, num_classes=3), Diffusion(prediction=prediction), 0
    for p in model.parameters(): torch.nn.init.normal_(p, std=.05)       # a fresh DiT gives zeros
    with torch.no_grad():
        for step in range(4):
            a, b, c = (loss_of(d, model, process, step) for d in (live, mapped, held))
            assert b==c and abs(a-b)<1e-3*a, (a, b, c)
            worst = max(worst, abs(a-b)/a)
    say(f'{kind}, predicting {prediction}: the loss from the cache differs from that on the fly by {worst:.1e} at most')

def test_any_share_of_a_step(stuff):
    "Two processes, or two micro-batches, see what one sees; the seed, the step and 'val' matter."
    c, u = L.open_cache(stuff/'whole'), torch.rand(48)
    whole = c.to_model(next(c.batches(1, 48, 7, 8))[0], u, 1, 7)
    for cuts in ((0, 24, 48), (0, 5, 6, 40, 48)):
        parts = [c.to_model(next(c.batches(1, 48, 7, 8, lo, hi, workers=2))[0], u[lo:hi], 1, 7, lo) for lo,hi in zip(cuts, cuts[1:])]
        assert torch.equal(torch.cat(parts), whole)
    x = next(c.batches(1, 48, 7, 8))[0]
    for seed,step in ((1, 8), (2, 7), (1, 'val')): assert not torch.equal(c.to_model(x, u, seed, step), whole)
    assert torch.equal(L.posterior_noise(0, 3, 17, 40, (2,3)), L.posterior_noise(0, 3, 0, 64, (2,3))[17:40])

def test_mirror_images(stuff, tmp_path):
    "Where the uniform is below one half the mirror image is taken, else the picture; a cache without mirror images refuses."
    c, data, vae = L.open_cache(stuff/'whole'), open_data(stuff/'photos', SIZE), L.load_vae(stuff/'vae')
    x = torch.stack([data[i][0] for i in range(4)]).float()/127.5-1
    for flip,images in ((torch.tensor([.1, .9, .4, .6]), torch.stack([x[0].flip(-1), x[1], x[2].flip(-1), x[3]])), (None, x)):
        mean, std = vae.moments(images)
        want = mean+std*L.posterior_noise(0, 0, 0, 4, c.shape)
        for d,xs in ((c, c.gather(torch.arange(4))), (L.open_cache(stuff/'whole').to('cpu'), torch.arange(4))): assert torch.allclose(d.to_model(xs, flip, 0, 0), want, atol=5e-3)
    assert c.labels[:4].tolist()==[0]*4
    n = L.open_cache(again(stuff, tmp_path/'n', flip=False, mean_only=True))
    assert not n.flip and not n.posterior and n.nbytes*4==c.nbytes and n.fingerprint()!=c.fingerprint()
    with pytest.raises(UserError, match='no mirror images'): n.to_model(next(n.batches(0, 8, 0, 1))[0], torch.rand(8), 0, 0)
    assert torch.allclose(n.to_model(n.gather(torch.arange(4)), None, 0, 0), vae.moments(x)[0], atol=5e-3)

def test_set_in_memory(tmp_path, stuff):
    "Grey pictures held in memory are encoded, too; split and subset keep labels."
    from mixmix_nb.data import split
    m = MemoryData(torch.randint(0, 256, (40,1,16,16), dtype=torch.uint8), torch.arange(40)%4, list('abcd'))
    c = L.open_cache(L.encode(m, L.load_vae(stuff/'vae'), tmp_path/'c', False, shard=16))
    train, val = split(c, .25, 0); t2, v2 = split(m, .25, 0)
    assert (len(train), len(val), c.files) == (30, 10, []) and torch.equal(train.labels, t2.labels) and torch.equal(val.to('cpu').labels, v2.labels)

# ---- memory

ENCODE = '''
import os, sys, torch
from pathlib import Path
from mixmix_nb import latents as L
from mixmix_nb.data import open_data
torch.set_num_threads(1)
def anonymous(): return int([l for l in open('/proc/self/status') if l.startswith('RssAnon')][0].split()[1])/1024
real, seen = L.write_parts, []
def write_parts(path, parts):
    real(path, parts)
    if path.name.startswith('shard'): seen.append(anonymous())
L.write_parts = write_parts
class Model(torch.nn.Module):                                       # nearly no work, many channels
    config = type('Config', (dict,), dict(__getattr__=dict.__getitem__))(latent_channels=12, block_out_channels=(1, 1))
    def encode(self, x):
        z = torch.nn.functional.pixel_unshuffle(x, 2)
        return type('O', (), dict(latent_dist=type('D', (), dict(parameters=torch.cat([z, z-8], 1)))))
L.encode(open_data(sys.argv[1], 64), L.VAE(Model()), sys.argv[2], False, shard=64, batch=16, workers=1)
half = [sorted(v)[5] for v in (seen[4:14], seen[14:24])]             # medians
print(sum(f.stat().st_size for f in Path(sys.argv[2]).glob('shard*'))/2**20, *half)
'''
ONE_ARENA = dict(OMP_NUM_THREADS='1', MALLOC_ARENA_MAX='1', MALLOC_TRIM_THRESHOLD_='131072', MALLOC_MMAP_THRESHOLD_='131072')     # what is freed is given back

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_memory_stays_flat_while_encoding(stuff, tmp_path, say):
    "What is written is not kept: from JPEGs, decoded by a worker, the second half of the shards takes no more memory than the first."
    (tmp_path/'photos').mkdir()
    for i in range(1536): os.link(stuff/'photos'/'abc'[i%3]/f'{9+i%51:03d}.jpg', tmp_path/'photos'/f'{i:04d}.jpg')
    r = python('-c', ENCODE, tmp_path/'photos', tmp_path/'c', **ONE_ARENA)
    assert r.returncode==0, r.stderr
    size, early, late = map(float, r.stdout.split()[-3:])
    assert size>70 and late<early+size/6, (size, early, late)       # 10 shards of 24 lie between the two medians: a list of all would grow by 5/12
    say(f'encoding {size:.0f} MiB of latents: anonymous memory {early:.0f} MiB in the first half of the shards, {late:.0f} MiB in the second')

def fake_machine(d, groups, files, meminfo='MemTotal: 8000 kB\nMemAvailable: 5000 kB\n'):
    "A /proc and a tree of cgroups, in two folders: what this process is in, and files with their text."
    for name,text in {'proc/meminfo': meminfo, 'proc/self/cgroup': groups, 'proc/self/status': 'VmSize: 900 kB\nVmData: 400 kB\n', **{f'cg/{k}': v for k,v in files.items()}}.items():
        (d/name).parent.mkdir(parents=True, exist_ok=True); (d/name).write_text(str(text))
    return d/'proc', d/'cg'

KB = 1024
STAT = f'anon 1\nactive_file {100*KB}\ninactive_file {200*KB}\nfile_mapped 5\n'
V1 = f'active_file 7\ninactive_file 7\ntotal_active_file {100*KB}\ntotal_inactive_file {200*KB}\n'
def v2(d, limit, used, stat=STAT): return {f'{d}memory.max': limit, f'{d}memory.current': used, f'{d}memory.stat': stat}
def v1(d, limit, used): return {f'memory/{d}memory.limit_in_bytes': limit, f'memory/{d}memory.usage_in_bytes': used, f'memory/{d}memory.stat': V1}

@pytest.mark.parametrize('groups,files,total,free', [
    ('', {}, 8000, 5000),                                           # no cgroup
    ('0::/\n', v2('', 'max\n', 900*KB), 8000, 5000),                # one without a limit
    ('0::/\n', v2('', 2000*KB, 900*KB), 2000, 2000-900+300),        # pages of files can be dropped
    ('0::/\n', v2('', 2000*KB, 200*KB), 2000, 2000),                # never more than is allowed
    ('0::/a/b\n', v2('a/', 3000*KB, 2500*KB) | v2('a/b/', 'max\n', 100*KB), 3000, 800),      # the outer one counts, too
    ('0::/a/b\n', v2('a/', 3000*KB, 700*KB) | v2('a/b/', 1000*KB, 700*KB), 1000, 600),
    ('0::/elsewhere\n', v2('', 1500*KB, 500*KB), 1500, 1300),       # a container that sees its own group at the top
    ('5:cpu,cpuacct:/x\n4:memory:/x\n', v1('x/', 1000*KB, 800*KB) | v1('', 2**63-4096, 10**6), 1000, 500),    # version 1; the numbers of all inside
    ('5:cpu:/x\n', v1('x/', 1000*KB, 800*KB), 8000, 5000),          # not in this one
    ('0::/\n', v2('', 1000*KB, 3000*KB), 1000, 0)])                 # over the limit
def test_memory_that_cgroups_allow(tmp_path, monkeypatch, groups, files, total, free):
    import resource
    monkeypatch.setattr(resource, 'getrlimit', lambda _: (resource.RLIM_INFINITY,)*2)
    where = fake_machine(tmp_path, groups, files)
    assert (L.memory_total(*where), L.memory_free(*where))==(total*KB, free*KB)

def test_memory_that_limits_allow(tmp_path, monkeypatch):
    "`ulimit` counts in what is allowed and in what is left; a machine that tells nothing is taken for one with 4 GiB free."
    import resource
    limits = {resource.RLIMIT_DATA: (1500*KB, -1), resource.RLIMIT_AS: (1600*KB, -1)}
    monkeypatch.setattr(resource, 'getrlimit', lambda k: limits[k])
    where = fake_machine(tmp_path, '0::/\n', v2('', 3000*KB, 0))
    assert (L.memory_total(*where), L.memory_free(*where))==(1500*KB, 700*KB)
    limits = dict.fromkeys(limits, (resource.RLIM_INFINITY,)*2)
    monkeypatch.setattr(os, 'sysconf', dict(SC_PAGE_SIZE=4096, SC_PHYS_PAGES=2**22).get)
    assert (L.memory_total(tmp_path, tmp_path), L.memory_free(tmp_path, tmp_path))==(2**34, 2**32)
    monkeypatch.delattr(os, 'sysconf')
    assert L.memory_total(tmp_path, tmp_path)==2**32

FLAT = '''
import resource, sys, torch
from pathlib import Path
from mixmix_nb import latents as L
from mixmix_nb.training import StopSignal, Trainer
from mixmix_nb.diffusion import Diffusion
from mixmix_nb.models import DiT
torch.set_num_threads(1)
def status(key): return int([l for l in open('/proc/self/status') if l.startswith(key)][0].split()[1])/1024
d, n, shard = Path(sys.argv[1]), 4096, 64
plan = dict(format=L.FORMAT, images=n, shape=[4,32,32], flip=True, posterior=True, shard=shard, image_size=256, data='made up', data_fingerprint='', contents='', vae='', vae_fingerprint='', classes=None)
d.mkdir()
for k in range(n//shard):
    m = torch.randn(shard, 2, 4, 32, 32).half()
    L.write_parts(L.shard_path(d, k), L.shard_parts(dict(mean=m, labels=torch.zeros(shard, dtype=torch.long), std=m), dict(plan=L.plan_digits(plan), bad='[]')))
    L.shard_path(d, k).chmod(0o444); del m
L.finish(d, plan)
def train(data, steps):
    model = DiT(input_size=32, patch_size=8, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=1)
    t, seen = Trainer(model, Diffusion(), data, batch=64, steps=steps, flip=True), []
    for x,y,_ in t.stream(2, StopSignal()): t.train_step(x, y); seen.append(status('RssAnon'))
    return seen
train(L.open_cache(d).subset(torch.arange(64)), 2)                  # imports what a step imports
resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))      # less than shards
limit = int((status('VmData')+100)*2**20)                           # 100 MiB more than now
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try: torch.ones(150*2**20, dtype=torch.uint8); print('no limit')
except RuntimeError: pass
c = L.keep_latents(L.open_cache(d), 'cpu')
seen = train(c, 96)
print(c.moments is None, len(seen), c.nbytes/2**20, sorted(seen[20:40])[10], sorted(seen[-20:])[10])
'''

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_training_from_a_cache_larger_than_memory(tmp_path, say):
    "With 100 MiB of memory left, a cache of 128 MiB stays mapped, though nobody says so, and is trained on for an epoch and a half; anonymous memory stays flat."
    r = python('-c', FLAT, tmp_path/'c', OMP_NUM_THREADS='1', MALLOC_ARENA_MAX='1')
    assert r.returncode==0, r.stderr
    mapped, steps, size, early, late = r.stdout.split()[-5:]
    assert 'no limit' not in r.stdout and (mapped, steps, float(size))==('True', '96', 128) and float(late)<float(early)+16, r.stdout
    say(f'training from a cache of {float(size):.0f} MiB with 100 MiB of memory left: anonymous memory {float(early):.0f} MiB in the first epoch, {float(late):.0f} MiB in the second')

# ---- the trainer

def test_trained_on_latents(stuff, tmp_path):
    "The trainer encodes once, stopped in between or not, resumes from the cache without the pictures, has the loss of encoding on the fly, and draws pictures."
    photos, stop = tmp_path/'photos', tmp_path/'stop'
    shutil.copytree(stuff/'photos', photos)
    args = '--image-size 32 --model DiT-N/2 --batch-size 8 --steps 6 --log-every 1 --prediction v --num-sample-images 4 --sample-steps 3 --num-workers 0 --lr 1e-4'.split()
    def command(results, *more):
        r = forked('-m', 'mixmix_nb.train', *args, '--results-dir', results, *more, cwd=tmp_path, MIXMIX_CACHE=str(tmp_path/'cache'), MIXMIX_STOP_FILE=str(stop))
        assert r.returncode==0, r.stderr
        return r.stdout+r.stderr
    def train(results, *more):
        said = command(results, *more)
        run, = (tmp_path/results).iterdir()
        return run, [float(l.split(',')[3]) for l in (run/'metrics.csv').read_text().splitlines()[1:]], said
    _, fly, _ = train('fly', '--data-path', 'photos', '--vae', stuff/'vae')
    stop.touch()
    said = command('kept', '--data-path', 'photos', '--vae', stuff/'vae', '--cache-latents', '--resume', 'auto')
    assert 'stopped by the stop file while the latents were made, which are kept; go on with --resume auto' in said and not [*tmp_path.glob('kept/*')], said
    assert not [*tmp_path.rglob('cache.json')]
    stop.unlink()
    run, kept, _ = train('kept', '--data-path', 'photos', '--vae', stuff/'vae', '--cache-latents', '--resume', 'auto')
    assert len(fly)==6 and all(abs(a-b)<1e-3*abs(a) for a,b in zip(fly, kept)), (fly, kept)
    shutil.rmtree(photos)
    cache, = (tmp_path/'cache'/'latents').iterdir()
    again, more, said = train('kept', '--data-path', cache, '--resume', 'auto', '--steps', '9')
    assert again==run and 'from step 6' in said and more[:6]==kept and len(more)==9, said
    with Image.open(run/'samples'/'final.png') as im: assert im.size[0]>=2*32 and np.asarray(im).std()>1
    r = forked('-m', 'mixmix_nb.sample', '--ckpt', run/'checkpoints'/'final.pt', '--num-images', '2', '--each', '--out', 'each', cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert [Image.open(f).size for f in (tmp_path/'each').iterdir()]==[(32,32)]*2
    r = forked('-m', 'mixmix_nb.train', '--data-path', cache, '--image-size', '64', cwd=tmp_path)
    assert r.returncode==2 and '32 pixels' in r.stderr and r.stderr.count('\n')==1, r.stderr
