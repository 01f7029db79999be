"The README's main job: one command, and a minute or two later digits that are digits."
from PIL import Image
import pytest
from conftest import python
from judge import judge_run, train_reader

@pytest.mark.timeout(900)
def test_first_command_draws_digits(tmp_path, say):
    r = python('-m', 'mixmix_nb.train', cwd=tmp_path, timeout=800)
    assert r.returncode==0, r.stderr
    run, = (tmp_path/'results').iterdir()
    for f in ('log.txt', 'metrics.csv', 'curves.png', 'config.json', 'checkpoints/final.pt', 'samples/final.png'): assert (run/f).stat().st_size>0, f
    assert '\r' not in r.stdout, 'a progress bar in a file'
    Image.open(run/'samples'/'final.png').load()
    reader = train_reader()
    assert reader[1]>=.99
    score = judge_run(run/'checkpoints'/'final.pt', reader=reader)
    say(f'the main job: {({k: round(v, 3) for k,v in score.items()})}')
    assert score['agreement']>=.95
    assert score['frechet']<=2*score['floor']
