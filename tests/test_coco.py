"MS-COCO in miniature from a local server: downloaded with interruptions, checked, unpacked, arranged, trained on."
import hashlib, io, json, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np, pytest
from PIL import Image
from conftest import train
from mixmix_nb import coco as c
from mixmix_nb.core import RunError, UserError

def archives(): # dict: path → bytes; twelve images of two classes
    files, images, annotations = io.BytesIO(), [], []
    with zipfile.ZipFile(files, 'w') as z:
        for i in range(12):
            jpeg = io.BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)).save(jpeg, 'JPEG')
            z.writestr(f'val2017/{i:012d}.jpg', jpeg.getvalue())
            images.append(dict(id=i, file_name=f'{i:012d}.jpg'))
            if i<11: annotations.append(dict(image_id=i, category_id=1+i%2, area=10., iscrowd=0))
    text = json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name='cat'), dict(id=2, name='dog')]))
    notes = io.BytesIO()
    with zipfile.ZipFile(notes, 'w') as z:
        z.writestr('annotations/instances_val2017.json', text)
        z.writestr('../outside.txt', 'a name that climbs out')
    return {'zips/val2017.zip': files.getvalue(), 'annotations/annotations_trainval2017.zip': notes.getvalue()}

@pytest.fixture
def server(monkeypatch):
    files, asked = archives(), []
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data, start = files[self.path[1:]], int((self.headers.get('Range') or 'bytes=0-')[6:-1])
            asked.append((self.path[1:], start))
            self.send_response(206 if start else 200)
            self.send_header('Content-Length', len(data)-start)
            self.end_headers()
            self.wfile.write(data[start:start+self.server.cut])
        def log_message(self, *args): pass
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.cut, s.files, s.asked = 10**9, files, asked
    threading.Thread(target=s.serve_forever, daemon=True).start()
    monkeypatch.setattr(c, 'FILES', {k: (len(v), hashlib.md5(v).hexdigest()) for k,v in files.items()})
    yield s
    s.shutdown()

def test_interrupted_checked_and_trained_on(server, tmp_path):
    o = dict(output_dir=str(tmp_path/'coco'), val_only=True, base_url=f'http://127.0.0.1:{server.server_port}')
    server.cut = 600
    for _ in range(2):
        with pytest.raises(RunError, match='run the same command again'): c.coco(**o)
    assert server.asked[1][1]>0, 'it did not continue where it had stopped'
    server.cut = 10**9
    assert c.coco(**o)=={'val': 11}
    folder, requests = tmp_path/'coco'/'imagefolder'/'val', len(server.asked)
    assert {p.name: len(list(p.iterdir())) for p in folder.iterdir()}=={'cat': 6, 'dog': 5}
    assert not (tmp_path/'outside.txt').exists(), 'an archive wrote outside of its folder'
    assert c.coco(**o)=={'val': 11} and len(server.asked)==requests, 'done things are done again'
    train('--data-path', folder, '--image-size', 16, '--model', 'DiT-N/4', '--steps', 2, '--batch-size', 4, '--num-sample-images', 0, '--num-workers', 0, cwd=tmp_path)

def test_a_wrong_checksum_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(c, 'FILES', {k: (n, '0'*32) for k,(n,_) in c.FILES.items()})
    with pytest.raises(RunError, match='wrong checksum'):
        c.coco(output_dir=str(tmp_path/'coco'), val_only=True, base_url=f'http://127.0.0.1:{server.server_port}')
    with pytest.raises(UserError, match='not both'): c.coco(val_only=True, include_val=True)

def test_another_label_moves_the_images(server, tmp_path):
    o = dict(output_dir=str(tmp_path/'coco'), val_only=True, base_url=f'http://127.0.0.1:{server.server_port}')
    c.coco(**o)
    path = tmp_path/'coco'/'annotations'/'instances_val2017.json'
    a = json.loads(path.read_text())
    a['annotations'] += [dict(image_id=i, category_id=2, area=1., iscrowd=0) for i in range(12) for _ in range(2)]
    path.write_text(json.dumps(a))
    c.coco(**o, label='most-frequent')
    assert {p.name: len(list(p.iterdir())) for p in (tmp_path/'coco'/'imagefolder'/'val').iterdir()}=={'dog': 12}
    assert len(list((tmp_path/'coco'/'images'/'val2017').iterdir()))==12

def test_faults_are_one_line(server, tmp_path):
    o = dict(output_dir=str(tmp_path/'coco'), val_only=True)
    with pytest.raises(UserError, match='not an address'): c.coco(**o, base_url='nowhere')
    with pytest.raises(RunError, match='run the same command again'): c.coco(**o, base_url='http://127.0.0.1:1')
    archive = tmp_path/'coco'/'annotations_trainval2017.zip'
    archive.write_bytes(server.files['annotations/annotations_trainval2017.zip'][:-100])
    with pytest.raises(RunError, match='damaged.*delete it'): c.coco(**o)
