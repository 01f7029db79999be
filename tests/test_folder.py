"A real folder of JPEGs: train, resume, sample."
import csv, json, tarfile
import numpy as np, pytest
from PIL import Image
from conftest import forked

@pytest.mark.timeout(900)
def test_cifar10_folder(data_dir, tmp_path):
    with tarfile.open(data_dir/'cifar10'/'test.tar.xz') as t:         # one picture in eight: 50 steps are more than an epoch
        t.extractall(tmp_path/'cifar10', [m for m in t if m.isdir() or int(m.name[-8:-4])%8==0], filter='data')
    bad = next((tmp_path/'cifar10'/'test').glob('*/*.jpg'))
    bad.write_bytes(bad.read_bytes()[:300])                      # one file is torn
    args = '--image-size 32 --vae none --model DiT-N/4 --batch-size 32 --log-every 5 --sample-steps 5 --num-sample-images 4 --num-workers 2'.split()
    go = lambda *more: forked('-m', 'mixmix_nb.train', '--data-path', 'cifar10/test', *args, *more, cwd=tmp_path, timeout=600)
    r = go('--steps', '50', '--ckpt-every', '20')
    assert r.returncode==0, r.stderr
    run, = (tmp_path/'results').iterdir()
    assert json.loads((run/'config.json').read_text())['args']['num_classes']==10
    assert bad.name in (run/'log.txt').read_text()
    rows = list(csv.DictReader((run/'metrics.csv').open()))
    assert int(rows[-1]['step'])==50 and int(rows[-1]['bad_files'])==1
    assert float(rows[-1]['mse'])<float(rows[0]['mse'])
    r = go('--steps', '60', '--resume', 'auto')
    assert r.returncode==0 and 'from step 50' in r.stdout, r.stdout+r.stderr
    r = forked('-m', 'mixmix_nb.sample', '--ckpt', run/'checkpoints'/'final.pt', '--num-sampling-steps', '5', '--classes', 'cat,dog', '--num-images', '4', '--out', 'pets.png', cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert np.asarray(Image.open(tmp_path/'pets.png')).std()>10
