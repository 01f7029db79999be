"Folders and files as people have them; decoding processes that die, lack memory or get signals; validation."
import multiprocessing, os, pickle, pwd, subprocess, sys, time
import numpy as np, pytest, torch
from PIL import Image, PngImagePlugin
from sklearn.datasets import load_sample_images
from conftest import child_env
from mixmix_nb import data as D, datasets, images as I
from mixmix_nb.core import RunError, UserError

def adm(im, size): # the recipe of Dhariwal & Nichol (2021), int (size,size,3)
    while min(im.size)>=2*size: im = im.resize(tuple(s//2 for s in im.size), Image.BOX)
    im = im.resize(tuple(round(s*size/min(im.size)) for s in im.size), Image.BICUBIC)
    a, (w, h) = np.array(im).astype(int), im.size
    return a[(h-size)//2:(h-size)//2+size, (w-size)//2:(w-size)//2+size]

@pytest.mark.parametrize('w,h', [(640, 427), (1280, 848), (1281, 855), (1999, 3001), (4000, 3000)])
def test_the_crop_is_adms(tmp_path, w, h):
    Image.fromarray(load_sample_images().images[0]).resize((w, h), Image.LANCZOS).save(tmp_path/'x.jpg', quality=92)
    for size in (32, 64, 256):
        got = I.read_image(tmp_path/'x.jpg', size).permute(1, 2, 0).numpy()
        assert abs(got-adm(Image.open(tmp_path/'x.jpg').convert('RGB'), size)).max()<=3, size

def test_what_pillow_reads_is_read(tmp_path):
    (tmp_path/'a').mkdir()
    red, notes = Image.new('RGB', (40, 30), 'red'), PngImagePlugin.PngInfo()
    notes.add_text('prompt', 'a'*(3<<20), zip=True)                     # beyond Pillow's limit for attackers
    for ext in ('jpg', 'JPEG', 'png', 'webp', 'bmp', 'tga', 'tiff', 'jp2', 'gif', 'ppm'): red.save(tmp_path/'a'/f'{ext}.{ext}')
    red.save(tmp_path/'a'/'long.png', pnginfo=notes)
    data = I.FolderData(tmp_path, 16)
    assert len(data)==11
    for i in range(11): assert (data[i][0].float().mean((1, 2))-torch.tensor([255., 0, 0])).abs().max()<4, data.name_of(i)

@pytest.mark.parametrize('levels,want', [(np.uint16(65535), 255), (np.float32(1), 255), (np.float32(255), 255), (np.float32(-1), None),
                                         (np.int32(65535), 255), (np.int32(70000), None), (np.int32(200), None), (np.float32('nan'), None)])
def test_grey_levels(tmp_path, levels, want): # None: rejected with the reason, since nobody knows what was meant
    Image.fromarray(np.full((8, 8), levels)).save(tmp_path/'x.tiff')
    if want is not None: assert I.read_image(tmp_path/'x.tiff', 8).unique().tolist()==[want]
    else: assert 'x.tiff (ValueError: grey levels from' in D.Readable(I.FolderData(two(tmp_path), 8))[1][2][0]

def two(folder): # the folder, with one sound image more
    Image.new('RGB', (9, 9)).save(folder/'a.png')
    return folder

def test_folders(tmp_path):
    for path in ('x/train2017', 'x/val2017', 'y/cat/deep', 'y/__MACOSX', 'y/.hidden', 'y/dog'): (tmp_path/path).mkdir(parents=True)
    for path in ('x/train2017', 'x/val2017', 'y/cat', 'y/cat/deep', 'y/__MACOSX', 'y/.hidden'): two(tmp_path/path)
    (tmp_path/'x'/'annotations').mkdir()
    with pytest.raises(UserError, match=r'choose one: .*/x/train2017'): I.FolderData(tmp_path/'x', 8)
    (tmp_path/'y'/'cat'/'deep'/'again').symlink_to(tmp_path/'y')         # a loop
    (tmp_path/'y'/'cat'/'gone.png').symlink_to('nowhere.png')
    data = I.FolderData(tmp_path/'y', 8)
    assert data.info.classes==['cat', 'dog'] and data.files==['cat/a.png', 'cat/deep/a.png', 'cat/gone.png'] and data.notes==['classes without images: dog']
    assert data.fingerprint()!=I.FolderData(tmp_path/'y'/'cat', 8).fingerprint() and data.info.flip
    Image.new('L', (9, 9)).save(tmp_path/'y'/'dog'/'grey.png')
    (tmp_path/'y'/'dog'/'a.raw').touch()
    flat = I.FolderData(tmp_path/'y'/'dog', 8)
    assert flat.info.classes is None and not flat.info.flip and 'files left out: 1 .raw' in flat.notes
    part = pickle.loads(pickle.dumps(D.holdout(data, .4, 0)[0]))        # as workers are started on macOS
    assert len(part)==2 and part.name_of(0).endswith('.png')

class Slow(D.Dataset):
    info = I.DataInfo('slow', (3, 256, 256))
    def __len__(self): return 64
    def __getitem__(self, i):
        if i%9==4: raise OSError('damaged')
        return torch.zeros(3, 256, 256, dtype=torch.uint8), i

def test_bad_samples_of_any_dataset_are_named_once():
    seen = [b for *_,bad in D.batches(Slow(), seed=0, batch=8, start=0, stop=40, workers=2) for b in bad]
    assert sorted(seen)==sorted(f'sample {i} (OSError: damaged)' for i in range(4, 64, 9))

def test_a_killed_worker_is_no_accident_in_a_step():
    stream = D.batches(Slow(), seed=0, batch=4, start=0, stop=400, workers=2)
    next(stream)
    multiprocessing.active_children()[0].kill()
    time.sleep(.5)                                                      # PyTorch's own handler would raise here
    with pytest.raises(RunError, match='--num-workers 0.*--shm-size'): list(stream)

SCRIPT = '''
import os, resource, signal, sys, time
from test_data import D, RunError, Slow
if sys.argv[1]=='shm': resource.setrlimit(resource.RLIMIT_FSIZE, (1<<20, 1<<20))
else: signal.signal(signal.SIGTERM, lambda *args: print('asked'))
try:
    for k,_ in enumerate(D.batches(Slow(), seed=0, batch=16, start=0, stop=40, workers=2)):
        if k==2 and sys.argv[1]=='group': os.killpg(0, signal.SIGTERM), time.sleep(.5)     # as torchrun does
    print('done')
except RunError as e: print('RunError', e)
'''
@pytest.mark.parametrize('kind', ['group', *(['shm'] if sys.platform=='linux' else [])])
def test_signals_and_shared_memory(kind):
    env = child_env(PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]))
    r = subprocess.run([sys.executable, '-c', SCRIPT, kind], env=env, timeout=60, start_new_session=True, capture_output=True, text=True)
    assert r.stdout.startswith('asked\ndone' if kind=='group' else 'RunError a decoding process died') and 'Traceback' not in r.stderr, r.stdout+r.stderr

def test_workers_are_honoured_by_one_loader(tmp_path, monkeypatch):
    made, real = [], D.DataLoader
    monkeypatch.setattr(D, 'DataLoader', lambda *a, **kw: made.append(kw['num_workers']) or real(*a, **kw | dict(num_workers=0)))
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(8), raising=False)
    assert len(list(D.val_batches(Slow(), batch=4, workers=3)))==16 and made==[3]
    for workers in (2, 0): D.in_memory(I.FolderData(two(tmp_path), 8), torch.device('cpu'), workers=workers)
    assert made==[3, 2, 0]

def test_no_home(monkeypatch):
    for name in ('HOME', 'MIXMIX_CACHE'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', lambda uid: {}[uid])
    assert datasets.cache_dir().is_absolute()
    with pytest.raises(UserError, match='does not exist'): datasets.open_data('~nobody-here/images')
