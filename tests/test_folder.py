"A real folder of JPEGs: train, resume, sample."
import csv, json, tarfile
import numpy as np, pytest
from PIL import Image
from conftest import python

@pytest.mark.timeout(900)
def test_cifar10_folder(data_dir, tmp_path):
    with tarfile.open(data_dir/'cifar10'/'test.tar.xz') as t: t.extractall(tmp_path/'cifar10', filter='data')
    bad = next((tmp_path/'cifar10'/'test').glob('*/*.jpg'))
    bad.write_bytes(bad.read_bytes()[:300])                      # one file is torn
    args = '--image-size 32 --vae none --model DiT-N/4 --batch-size 64 --log-every 10 --sample-steps 5 --num-sample-images 4 --num-workers 2'.split()
    go = lambda *more: python('-m', 'mixmix_nb.train', '--data-path', 'cifar10/test', *args, *more, cwd=tmp_path, timeout=600)
    r = go('--steps', '170', '--ckpt-every', '60')
    assert r.returncode==0, r.stderr
    run, = (tmp_path/'results').iterdir()
    assert json.loads((run/'config.json').read_text())['args']['num_classes']==10
    assert bad.name in (run/'log.txt').read_text()
    rows = list(csv.DictReader((run/'metrics.csv').open()))
    assert int(rows[-1]['step'])==170 and int(rows[-1]['bad_files'])==1
    assert float(rows[-1]['mse'])<float(rows[0]['mse'])
    r = go('--steps', '200', '--resume', 'auto')
    assert r.returncode==0 and 'from step 170' in r.stdout, r.stdout+r.stderr
    r = python('-m', 'mixmix_nb.sample', '--ckpt', run/'checkpoints'/'final.pt', '--num-sampling-steps', '5', '--classes', 'cat,dog', '--num-images', '4', '--out', 'pets.png', cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert np.asarray(Image.open(tmp_path/'pets.png')).std()>10
