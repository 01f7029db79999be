"""The COCO command against a small COCO of the same format, served by this machine to itself: a server with bad days, SIGKILL at many places, archives that mean harm."""
import errno, hashlib, json, os, random, re, shutil, signal, stat, subprocess, sys, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from conftest import child_env
from mixmix_nb import coco
from mixmix_nb.core import UserError, RunError

ANNOTATIONS = 'annotations_trainval2017.zip'

class Files(BaseHTTPRequestHandler):
    "Files below `server.root`; `server.mishaps[name]` is a list of what goes wrong, one a request."
    def do_GET(self):
        s = self.server; f = Path(str(s.root)+self.path)
        bad = s.mishaps.get(f.name) or [{}]; bad = bad.pop(0)
        data = bad.get('data', f.read_bytes() if f.is_file() else None)
        status, tag = bad.get('status', 200 if data is not None else 404), f'"{hashlib.md5(data or b"").hexdigest()}"'
        start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        if bad.get('no_range') or (self.headers.get('If-Range', tag)!=tag and not bad.get('no_if_range')): start = 0
        if status==200 and start: status = 206 if start<len(data) else 416
        s.log.append((f.name, self.headers.get('Range'), status))
        self.send_response(status)
        if not bad.get('no_tag'): self.send_header('ETag', tag)
        body = data[start:] if status<300 else b''
        if status==206: self.send_header('Content-Range', f'bytes {start}-{len(data)-1}/{len(data)}')
        if not bad.get('no_length'): self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body[:bad.get('cut')])
            if 'kill' in bad:
                self.wfile.flush(); time.sleep(.1)                 # the client has had the time to write some of it
                s.child.kill(); s.child.wait()
        except OSError: pass
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A folder as on the server of COCO, and the table of sums."
    d = tmp_path_factory.mktemp('small')
    sums = coco.small_coco(d)
    (d/'checksums.json').write_text(json.dumps(sums))
    return d

@pytest.fixture
def server(small, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(coco, 'flush', lambda: None)
    s = ThreadingHTTPServer(('127.0.0.1', 0), Files)
    s.root, s.mishaps, s.log, s.child = small, {}, [], None
    threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
    s.base = f'http://127.0.0.1:{s.server_port}'
    yield s
    s.shutdown(); s.server_close()

MORTAL = '''
import os, signal, sys, time
time.sleep = lambda s: None                                        # waits between tries
count, last, inside = 0, int(sys.argv[1]), sys.argv[2]
EVENTS = {'open', 'os.rename', 'os.symlink', 'os.link', 'os.mkdir', 'os.remove', 'os.rmdir', 'shutil.copyfile', 'shutil.rmtree', 'urllib.Request'}
def hook(event, args):
    global count
    if event not in EVENTS or not (event=='urllib.Request' or any(inside in str(a) for a in args)): return
    count += 1
    if count==last: os.kill(os.getpid(), signal.SIGKILL)
import mixmix_nb.coco as c
c.flush = lambda: None                                             # against a power failure; slow where others write a lot
sys.addaudithook(hook)
c.main(sys.argv[3:])
print('events:', count)
'''

def start(server, out, *more, kill_at=0):
    "The command in a process of its own, killed before its `kill_at`-th operation on files in `out` or on the network (0: never)."
    args = ['--base-url', server.base, '--checksums', str(server.root/'checksums.json'), '--output-dir', str(out), *more]
    server.child = subprocess.Popen([sys.executable, '-c', MORTAL, str(kill_at), str(out), *args], env=child_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = server.child.communicate(timeout=120)
    return server.child.returncode, stdout, stderr

def run(server, out, *more):
    "The command in this process: what it returns."
    return coco.main(['--base-url', server.base, '--checksums', str(server.root/'checksums.json'), '--output-dir', str(out), *more])

def tree(d):
    "Every folder, every file's bytes, every link's target; hard links count as files."
    return {p.relative_to(d).as_posix(): ('link', os.readlink(p)) if p.is_symlink() else p.read_bytes() if p.is_file() else 'folder' for p in sorted(d.rglob('*'))}

@pytest.fixture
def no_wait(monkeypatch): monkeypatch.setattr(time, 'sleep', lambda s: None)

# ---- killed

@pytest.mark.timeout(300)
@pytest.mark.parametrize('link', ['symlink', 'copy'])
def test_killed_anywhere(server, tmp_path, link):
    "Ten preparations killed before a random operation each, in a tree of its own, and started again: the same files, byte for byte, link for link."
    options = ['--include-val', '--label', 'multi', '--link', link]
    status, out, err = start(server, tmp_path/'whole', *options)
    assert status==0, err
    total, whole = int(out.split('events:')[1]), tree(tmp_path/'whole')
    assert total>150 and 'imagefolder/train/.complete.json' in whole and not [n for n in whole if n.endswith(('.zip', '.part', '.tmp', '.new', '.old'))]
    rng = random.Random(f'kill {link}')
    for i in range(10):
        at = rng.randrange(total*i//10, total*(i+1)//10)+1
        assert start(server, tmp_path/f'k{i}', *options, kill_at=at)[0]==-signal.SIGKILL
        status, _, err = start(server, tmp_path/f'k{i}', *options)
        assert status==0, f'killed at {at} of {total}: {err}'
        assert tree(tmp_path/f'k{i}')==whole, f'killed at {at} of {total}'

@pytest.mark.timeout(300)
def test_killed_ten_times_in_a_row(server, tmp_path):
    assert start(server, tmp_path/'whole', '--val-only')[0]==0
    rng = random.Random('in a row')
    for i in range(10): assert start(server, tmp_path/'k', '--val-only', kill_at=rng.randrange(5, 100))[0]==-signal.SIGKILL
    assert start(server, tmp_path/'k', '--val-only')[0]==0
    assert tree(tmp_path/'k')==tree(tmp_path/'whole')

def test_killed_inside_a_download(server, tmp_path):
    "The bytes that had come are not fetched again."
    assert start(server, tmp_path/'whole', '--val-only')[0]==0
    size = (server.root/'zips/val2017.zip').stat().st_size
    server.log.clear()
    for cut in (60_000, 50_000):
        server.mishaps['val2017.zip'] = [dict(cut=cut, kill=True)]
        assert start(server, tmp_path/'k', '--val-only')[0]==-signal.SIGKILL
    status, _, err = start(server, tmp_path/'k', '--val-only')
    assert status==0, err
    assert tree(tmp_path/'k')==tree(tmp_path/'whole')
    assert [r for n,r,_ in server.log if n==ANNOTATIONS]==[None]

def test_other_rule_over_a_complete_one_killed(server, tmp_path):
    "Changing --label swaps the folder whole; in between the old or the new one is there, or nothing, never a mixture."
    start(server, tmp_path/'whole', '--val-only', '--label', 'multi')
    for at in range(40, 400, 60):
        out = tmp_path/f'k{at}'
        assert start(server, out, '--val-only')[0]==0
        start(server, out, '--val-only', '--label', 'multi', kill_at=at)
        assert start(server, out, '--val-only', '--label', 'multi')[0]==0
        assert tree(out)==tree(tmp_path/'whole')

@pytest.mark.parametrize('n', range(1, 15, 2))
def test_interrupted_inside_a_write(server, tmp_path, monkeypatch, n):
    "The n-th small file is half written when the process ends."
    run(server, tmp_path/'whole', '--val-only')
    real, count = Path.write_bytes, [0]
    def torn(self, data):
        count[0] += 1
        if count[0]==n: real(self, data[:len(data)//2]); raise KeyboardInterrupt
        return real(self, data)
    monkeypatch.setattr(Path, 'write_bytes', torn)
    with pytest.raises(SystemExit) as e: run(server, tmp_path/'k', '--val-only')
    assert e.value.code==130
    monkeypatch.setattr(Path, 'write_bytes', real)
    run(server, tmp_path/'k', '--val-only')
    assert tree(tmp_path/'k')==tree(tmp_path/'whole')

@pytest.mark.parametrize('n', [1, 2])
def test_interrupted_between_the_two_annotation_files(server, tmp_path, monkeypatch, n):
    run(server, tmp_path/'whole', '--val-only')
    real, count = coco.unpack_member, [0]
    def dies(z, m, to):
        real(z, m, to); count[0] += 1
        if count[0]==n: raise KeyboardInterrupt
    monkeypatch.setattr(coco, 'unpack_member', dies)
    with pytest.raises(SystemExit): run(server, tmp_path/'k', '--val-only')
    monkeypatch.setattr(coco, 'unpack_member', real)
    run(server, tmp_path/'k', '--val-only')
    assert tree(tmp_path/'k')==tree(tmp_path/'whole')

def test_what_an_earlier_start_has_left_is_checked_and_cleaned(server, tmp_path):
    run(server, tmp_path/'whole', '--val-only'); out = tmp_path/'k'
    for name,data in {'.val2017.new/000000000011.jpg': b'x', '.val2017.new/000000000022.jpg.tmp': b'x', '.val2017.new/gone.jpg': b'x', 'imagefolder/.val.new/gone/x.jpg': b'x',
                      'imagefolder/.val.old/x/x.jpg': b'x', 'val2017.zip.part.json.tmp': b'x', 'annotations/instances_val2017.json.tmp': b'x', 'imagefolder/category_mapping.json.tmp': b'x', '.try-a': b'x'}.items():
        (out/name).parent.mkdir(parents=True, exist_ok=True); (out/name).write_bytes(data)
    right = (tmp_path/'whole/val2017/000000000011.jpg').stat().st_size
    (out/'.val2017.new/000000000011.jpg').write_bytes(b'x'*right)      # of the right length
    run(server, out, '--val-only'); assert tree(out)==tree(tmp_path/'whole')
    for name in ('val2017.zip', 'val2017.zip.part', 'val2017.zip.part.json', ANNOTATIONS): (out/name).write_bytes(b'x')
    (out/'imagefolder/.val.old').mkdir(); (out/'.val2017.new').mkdir()
    run(server, out, '--val-only'); assert tree(out)==tree(tmp_path/'whole')

# ---- the server's bad days

def fetch(server, tmp_path, mishaps, **kw):
    server.mishaps['val2017.zip'] = mishaps
    to = tmp_path/'val2017.zip'
    coco.fetch_checked(f'{server.base}/zips/val2017.zip', to, **kw)
    assert [p.name for p in tmp_path.iterdir()]==['val2017.zip']
    return to.read_bytes()

@pytest.mark.parametrize('checked', [True, False])
@pytest.mark.parametrize('mishaps', [
    [dict(cut=50_000)], [dict(cut=0), dict(cut=1), dict(cut=7)], [dict(status=500), dict(status=503), dict(status=429), dict(cut=9_000), dict(status=502)],
    [dict(cut=50_000), dict(no_range=True)], [dict(cut=50_000), dict(no_range=True, cut=20_000)],
    [dict(cut=50_000, no_tag=True)], [dict(cut=50_000, no_tag=True), dict(no_tag=True)], [dict(cut=50_000), dict(no_tag=True)],
    [dict(no_length=True)]], ids=lambda m: '-'.join('+'.join(d) for d in m))
def test_mishaps(server, small, tmp_path, no_wait, mishaps, checked):
    whole = (small/'zips/val2017.zip').read_bytes()
    sums = json.loads((small/'checksums.json').read_text())['val2017.zip'] if checked else {}
    assert fetch(server, tmp_path, mishaps, **sums)==whole
    assert not server.mishaps['val2017.zip']

@pytest.mark.parametrize('then', [{}, dict(no_if_range=True)], ids=['if-range', 'server without if-range'])
@pytest.mark.parametrize('checked', [True, False])
def test_file_changes_between_two_requests(server, small, tmp_path, no_wait, checked, then):
    whole = (small/'zips/val2017.zip').read_bytes()
    other = whole[::-1]
    sums = json.loads((small/'checksums.json').read_text())['val2017.zip'] if checked else {}
    assert fetch(server, tmp_path, [dict(data=other, cut=50_000), then], **sums)==whole
    assert len(server.log)<=3                       # noticed at once, and not by the sum after a whole file
    if not then: assert [status for *_,status in server.log]==[200, 200]      # the condition was in the question

def test_part_that_is_too_long_or_of_another_address(server, small, tmp_path, no_wait):
    whole = (small/'zips/val2017.zip').read_bytes()
    sums = json.loads((small/'checksums.json').read_text())['val2017.zip']
    part, note = coco.part_of(tmp_path/'val2017.zip')
    part.write_bytes(whole+b'more'); assert fetch(server, tmp_path, [], **sums)==whole
    (tmp_path/'val2017.zip').unlink()
    part.write_bytes(whole[:90_000]); note.write_text('{"url": "http://elsewhere/val2017.zip", "version": "\\"x\\""}'); server.log.clear()
    assert fetch(server, tmp_path, [], **sums)==whole and server.log[-1][1:]==('bytes=90000-', 206)     # another mirror goes on: the sum will tell
    (tmp_path/'val2017.zip').unlink()
    part.write_bytes(b'x'*90_000); note.write_text('torn')
    assert fetch(server, tmp_path, [])==whole and server.log[-1][1:]==(None, 200)                         # nothing vouches: from the start
    (tmp_path/'val2017.zip').unlink()
    part.write_bytes(b'x'*90_000)
    assert fetch(server, tmp_path, [], **sums)==whole and server.log[-2][1]=='bytes=90000-'               # the sum found out

def test_a_server_that_makes_no_progress_ends(server, tmp_path, no_wait, capsys):
    server.mishaps['val2017.zip'] = [dict(cut=50_000, no_range=True)]*100
    with pytest.raises(RunError, match='start the same command again'): coco.fetch(f'{server.base}/zips/val2017.zip', tmp_path/'val2017.zip')
    assert len(server.mishaps['val2017.zip'])==94

def test_wrong_sum_once_and_twice(server, small, tmp_path, capsys):
    whole = (small/'zips/val2017.zip').read_bytes(); wrong = whole[:-1]+b'?'
    sums = json.loads((small/'checksums.json').read_text())['val2017.zip']
    assert fetch(server, tmp_path, [dict(data=wrong)], **sums)==whole
    assert 'fetching it once more' in capsys.readouterr().out
    (tmp_path/'val2017.zip').unlink()
    with pytest.raises(RunError, match='wrong again'): fetch(server, tmp_path, [dict(data=wrong), dict(data=wrong)], **sums)
    assert not list(tmp_path.iterdir())

def test_broken_zip_is_fetched_again_once(server, small, tmp_path, capsys):
    "Without a checksum the zip's own CRC finds it."
    whole = (small/'zips/val2017.zip').read_bytes()
    broken = bytearray(whole); broken[len(whole)//2] ^= 1
    for wrong in (bytes(broken), whole[:70_000], b'<html>not today</html>'):
        out = tmp_path/hashlib.md5(wrong).hexdigest()
        server.mishaps['val2017.zip'] = [dict(data=wrong)]
        coco.main(['--base-url', server.base, '--checksums', 'none', '--output-dir', str(out), '--val-only'])
        assert 'val2017.zip is broken' in capsys.readouterr().out
        server.mishaps['val2017.zip'] = [dict(data=wrong)]*2
        with pytest.raises(SystemExit) as e: coco.main(['--base-url', server.base, '--checksums', 'none', '--output-dir', f'{out}2', '--val-only'])
        assert e.value.code==1 and 'val2017.zip is broken' in capsys.readouterr().err
        assert not (Path(f'{out}2')/'imagefolder').exists()
    server.mishaps.clear()
    run(server, tmp_path/'plain', '--val-only')
    assert tree(out)==tree(tmp_path/'plain')

# ---- archives that mean harm

def member(name, mode=stat.S_IFREG|0o644): m = zipfile.ZipInfo(name); m.external_attr = mode<<16; return m

@pytest.mark.parametrize('bad', [member('../evil.jpg'), member('val2017/../../evil.jpg'), member('/tmp/evil.jpg'), member('C:/evil.jpg'), member('val2017\\..\\..\\evil.jpg'),
    member('val2017/link', stat.S_IFLNK|0o777), member('val2017/fifo', stat.S_IFIFO|0o644), member('val2017/000000000011.jpg')], ids=lambda m: m.filename)
def test_no_member_leaves_the_folder(server, small, tmp_path, capsys, bad):
    evil = tmp_path/'evil.zip'; shutil.copy(small/'zips/val2017.zip', evil)
    with zipfile.ZipFile(evil, 'a') as z:
        import warnings
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); z.writestr(bad, b'/etc')
    server.mishaps['val2017.zip'] = [dict(data=evil.read_bytes())]
    out = tmp_path/'a'/'b'
    with pytest.raises(SystemExit) as e: coco.main(['--base-url', server.base, '--checksums', 'none', '--output-dir', str(out), '--val-only'])
    assert e.value.code==2
    line, = capsys.readouterr().err.splitlines()
    assert 'val2017.zip: the member' in line
    assert not list(tmp_path.rglob('evil.jpg')) and not (out/'val2017').exists() and not (out/'.val2017.new').exists()

def test_names_in_the_json_stay_inside(tmp_path):
    d, _ = coco.small_split('val')
    for name in ('../x.jpg', '/etc/x.jpg', '..', '', 'a\\b.jpg', '.hidden.jpg'):
        f = tmp_path/'i.json'; f.write_text(json.dumps(d | dict(images=[d['images'][0] | dict(file_name=name)], annotations=[])))
        with pytest.raises(UserError, match='no COCO annotation file'): coco.read_instances(f)

# ---- the folders

def test_labels_do_not_depend_on_the_order_of_annotations():
    d, _ = coco.small_split('train')
    a, b = coco.instances_of(d), coco.instances_of(d | dict(annotations=d['annotations'][::-1], categories=d['categories'][::-1], images=d['images'][::-1]))
    for rule in coco.RULES.values(): assert [rule(t) for t in a.things.values() if t]==[rule(t) for t in b.things.values() if t]
    assert coco.label_table(a)==coco.label_table(b) and list(a.things)==list(b.things) and a.categories==b.categories

def test_rules():
    T = lambda *a: [coco.Thing(i, area, crowd) for i,area,crowd in a]
    table = T((1, 10., False), (2, 3., False), (2, 4., False), (3, 99., True))
    assert (coco.largest(table), coco.most_frequent(table))==(1, 2)                   # the crowd does not count beside others
    assert coco.largest(T((3, 9., True), (4, 5., True)))==coco.most_frequent(T((3, 9., True), (4, 5., True)))==3
    assert coco.largest(T((5, 1., False), (4, 1., False)))==coco.most_frequent(T((5, 1., False), (4, 1., False)))==4

def test_folders_as_the_readers_see_them(server, tmp_path):
    from torchvision.datasets import ImageFolder
    from mixmix_nb.data import open_folder
    done = run(server, tmp_path, '--include-val')
    for s,(images,without) in dict(train=(9, 2), val=(5, 1)).items():
        folder = tmp_path/'imagefolder'/s
        assert (done[s]['images'], done[s]['unlabelled'])==(images, without)==(images, len((folder/'unlabelled.txt').read_text().split()))
        ours, theirs = open_folder(folder, 32), ImageFolder(folder, allow_empty=True)
        assert ours.classes==theirs.classes and len(ours.classes)==80 and len(ours)==images-without
        assert ours.labels.tolist()==theirs.targets
        inst = coco.read_instances(tmp_path/'annotations'/f'instances_{s}2017.json')
        assert {os.path.basename(os.fsdecode(f)): y for f,y in zip(ours.files, ours.labels.tolist())}=={f: coco.largest(t) for f,t in inst.things.items() if t}
        assert ours[0][2]==[]                                     # the picture can be read
    mapping = json.loads((tmp_path/'imagefolder/category_mapping.json').read_text())
    assert [m['index'] for m in mapping]==list(range(80)) and [m['folder'] for m in mapping]==ours.classes
    assert {m['coco_id']: m['name'] for m in mapping}==coco.CATEGORIES

@pytest.mark.parametrize('without,kind', [((), 'symlink'), (('symlink',), 'hard'), (('symlink', 'link'), 'copy')])
def test_file_systems_without_links(server, tmp_path, monkeypatch, without, kind):
    def refuse(*a, **kw): raise OSError(errno.EPERM, 'Operation not permitted')
    for name in without: monkeypatch.setattr(os, name, refuse)
    assert run(server, tmp_path/'d', '--val-only')['val']['link']==kind
    f = next((tmp_path/'d/imagefolder/val').glob('*/*.jpg')); source = tmp_path/'d/val2017'/f.name
    assert (f.is_symlink(), f.samefile(source))==(kind=='symlink', kind!='copy') and f.read_bytes()==source.read_bytes()
    (tmp_path/'d').rename(tmp_path/'moved')
    assert next((tmp_path/'moved/imagefolder/val').glob('*/*.jpg')).read_bytes()

def test_second_start_does_nothing_and_mends_what_is_missing(server, tmp_path, capsys):
    run(server, tmp_path, '--val-only'); before = tree(tmp_path); server.log.clear()
    run(server, tmp_path, '--val-only')
    assert 'nothing to do' in capsys.readouterr().out and tree(tmp_path)==before and not server.log
    next((tmp_path/'imagefolder/val').glob('*/*.jpg')).unlink()
    run(server, tmp_path, '--val-only'); assert tree(tmp_path)==before and not server.log
    shutil.rmtree(tmp_path/'imagefolder/val/000_person'); run(server, tmp_path, '--val-only'); assert tree(tmp_path)==before
    (tmp_path/'imagefolder/val/.complete.json').write_text('{'); run(server, tmp_path, '--val-only'); assert tree(tmp_path)==before
    shutil.rmtree(tmp_path/'val2017'); run(server, tmp_path, '--val-only'); assert tree(tmp_path)==before       # links to nothing: fetched again

def test_zips_and_parts_of_the_other_split_stay(server, tmp_path):
    tmp_path.joinpath('train2017.zip.part').write_bytes(b'hours of work'); tmp_path.joinpath('train2017.zip').write_bytes(b'more')
    run(server, tmp_path, '--val-only')
    assert (tmp_path/'train2017.zip.part').exists() and (tmp_path/'train2017.zip').exists() and not (tmp_path/'val2017.zip').exists()

def test_keep_zips_and_skip_download(server, small, tmp_path):
    run(server, tmp_path/'kept', '--val-only', '--keep-zips')
    assert (tmp_path/'kept/val2017.zip').read_bytes()==(small/'zips/val2017.zip').read_bytes() and (tmp_path/'kept'/ANNOTATIONS).exists()
    mine = tmp_path/'mine'; mine.mkdir(); server.log.clear()
    for name in ('val2017.zip', ANNOTATIONS): shutil.copy(tmp_path/'kept'/name, mine/name)
    run(server, mine, '--val-only', '--skip-download')
    assert not server.log and tree(mine)==tree(tmp_path/'kept')     # nothing of the user's is thrown away

# ---- one line, status 2

@pytest.mark.parametrize('options,says', [('--val-only --include-val', 'not both'), ('--label smallest', '--label must be one of'), ('--link magic', '--link must be one of'),
    ('--base-url images.cocodataset.org', '--base-url must begin'), ('--base-url http://[bad', '--base-url'), ('--base-url http://x:abc', '--base-url'), ('--base-url http://x:99999', '--base-url'), ('--checksums nowhere.json', '--checksums nowhere.json'), ('--checksums {here}/list.json', 'is no table'),
    ('--output-dir {here}/a_file', '--output-dir'), ('--output-dir {here}/o --skip-download', 'is not there'), ('--output-dir {here}/o --base-url {base}/nothing', 'the server says 404'),
    ('--output-dir {here}/o --checksums {here}/wrong_size.json', 'another file'), ('--out-dir x', 'did you mean --output-dir')])
def test_bad_input_is_one_line(server, small, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    Path('a_file').write_text('x'); Path('list.json').write_text('[1]')
    Path('wrong_size.json').write_text((small/'checksums.json').read_text().replace('"size": ', '"size": 1'))
    args = options.format(here=tmp_path, base=server.base).split()
    args = (['--base-url', server.base] if '--base-url' not in args else []) + (['--checksums', str(small/'checksums.json')] if '--checksums' not in args else []) + args
    with pytest.raises(SystemExit) as e: coco.main(args)
    line, = capsys.readouterr().err.splitlines()
    assert e.value.code==2 and line.startswith('mixmix_nb: ') and says in line, line
    assert not list(tmp_path.rglob('*.jpg'))

def test_room_is_asked_for_before_the_first_byte(server, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage._replace(free=10**10))
    with pytest.raises(SystemExit) as e: coco.main(['--base-url', server.base, '--output-dir', str(tmp_path), '--include-val'])
    err = capsys.readouterr().err
    assert e.value.code==2 and 'needs 40.0 GB' in err and '10.0 GB free' in err and not server.log

def test_room_is_not_underestimated(server, tmp_path, monkeypatch):
    "What the command holds on disk at its worst moment, measured before each rename."
    for more in ([], ['--keep-zips'], ['--link', 'copy'], ['--link', 'copy', '--keep-zips']):
        out = tmp_path/'-'.join(['d', *more]); peak = [0]; real = os.replace
        def replace(a, b):
            peak[0] = max(peak[0], sum(p.stat().st_size for p in out.rglob('*') if p.is_file() and not p.is_symlink() and p.suffix in ('.jpg', '.zip', '.part')))
            return real(a, b)
        monkeypatch.setattr(os, 'replace', replace)
        job = coco.Job(out, '', json.loads((server.root/'checksums.json').read_text()), False, '--keep-zips' in more, 1.)
        said = coco.room_needed(job, ['val', 'train'], 'copy' in more)[1]
        run(server, out, '--include-val', *more)
        monkeypatch.setattr(os, 'replace', real)
        assert .7*said<peak[0]<=said, (more, peak, said)

def test_full_disk_is_one_line_and_goes_on(server, tmp_path, capsys, monkeypatch):
    real, state = coco.receive, dict(full=True)
    def receive(r, part, start, total):
        if state['full'] and part.name.startswith('val'): part.write_bytes(r.read(30_000)); raise OSError(errno.ENOSPC, 'No space left on device')
        return real(r, part, start, total)
    monkeypatch.setattr(coco, 'receive', receive)
    with pytest.raises(SystemExit) as e: run(server, tmp_path/'d', '--val-only')
    err, = capsys.readouterr().err.splitlines()
    assert e.value.code==1 and 'the disk is full' in err
    state['full'] = False; server.log.clear()
    run(server, tmp_path/'d', '--val-only'); assert server.log==[('val2017.zip', 'bytes=30000-', 206)]
    run(server, tmp_path/'whole', '--val-only'); assert tree(tmp_path/'d')==tree(tmp_path/'whole')

def test_strangers_are_left_alone(server, tmp_path, capsys):
    f = tmp_path/'imagefolder/val/mine/x.jpg'; f.parent.mkdir(parents=True); f.write_bytes(b'x')
    with pytest.raises(SystemExit) as e: run(server, tmp_path, '--val-only')
    assert e.value.code==2 and 'was not made by this command' in capsys.readouterr().err and f.read_bytes()==b'x' and not server.log

def test_two_at_once(server, tmp_path, capsys):
    with coco.held(tmp_path):
        with pytest.raises(SystemExit) as e: run(server, tmp_path, '--val-only')
    assert e.value.code==2 and 'in use by another process' in capsys.readouterr().err
    run(server, tmp_path, '--val-only')

def test_missing_pictures_are_named(server, tmp_path, capsys):
    run(server, tmp_path, '--val-only'); (tmp_path/'val2017/000000000011.jpg').unlink()
    with pytest.raises(SystemExit) as e: run(server, tmp_path, '--val-only', '--label', 'multi')
    err = capsys.readouterr().err
    assert e.value.code==2 and '1 of 5 pictures' in err and '000000000011.jpg' in err

def test_help_is_light_and_the_printed_command_is_known(server, tmp_path, capsys):
    code = '''
import sys, runpy; sys.argv = ["x", "--help"]
try: runpy.run_module("mixmix_nb.coco", run_name="__main__")
except SystemExit as e: assert e.code==0
heavy = [m for m in ("torch", "torchvision", "numpy", "PIL", "sklearn", "matplotlib") if m in sys.modules]
assert not heavy, heavy'''
    r = subprocess.run([sys.executable, '-c', code], env=child_env(), capture_output=True, text=True)
    assert r.returncode==0 and '--skip-download' in r.stdout, r.stdout+r.stderr
    import shlex
    from mixmix_nb.core import parser
    from mixmix_nb.train import synonyms, train
    run(server, tmp_path/'a b', '--val-only')
    command = re.search(r'train on it: (.*)', capsys.readouterr().out)[1]
    given = vars(parser(train).parse_args(synonyms(shlex.split(command)[3:])))
    assert Path(given['data_path']).samefile(tmp_path/'a b/imagefolder/val') and given['num_classes']==80 and given['mixed_precision']=='best'
