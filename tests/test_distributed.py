"The number of processes does not change a run; all stop at one step; when one dies or refuses, all end, with one line."
import json
from pathlib import Path
import pytest, torch
from conftest import forked, side_by_side

HERE = Path(__file__).parent

def together(n, folder, *tasks, **env):
    "The tasks on `n` processes of torchrun, which has to notice how they end."
    args = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
    return forked(*args, HERE/'together.py', folder, *tasks, timeout=120, **dict(OMP_NUM_THREADS='1') | env)

def lines(r): return [l for l in r.stderr.splitlines() if l.startswith('mixmix_nb:')]

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Everything that ends well, in one start for each number of processes."
    d = tmp_path_factory.mktemp('together')
    for n, tasks in ((2, 'fp32 accumulate fp64 begin go-on stop clip+shard fp64+shard begin+shard go-on+shard overflow'), (4, 'fp32 fp64 go-on stop go-on+shard'),
                     (1, 'fp32 accumulate fp64 go-on clip from-shards')):
        side_by_side(n, HERE/'together.py', d, *tasks.split())
    return d

def gap(work, a, b):
    "The largest difference between the weights of two runs, and their averages and moments."
    a, b = (torch.load(work/f'{f}.pt', weights_only=True) for f in (a, b))
    assert a['train_steps']==b['train_steps'] and a['opt'].keys()==b['opt'].keys()
    far = lambda u, v: max((u[k]-v[k]).abs().max().item() for k in u)
    return max(far(a['model'], b['model']), far(a['ema'], b['ema']), *(far({k: v for k,v in a['opt'][n].items()}, b['opt'][n]) for n in a['opt']))

@pytest.mark.parametrize('other', ['fp32-2', 'fp32-4', 'accumulate-1', 'accumulate-2', 'go-on-1', 'go-on-2', 'go-on-4', 'go-on+shard-2', 'go-on+shard-4', 'from-shards-1'])
def test_same_weights(work, other, say):
    "20 steps: on 1, 2 and 4 processes, accumulated, and begun on 2 processes and ended on 1, 2 or 4."
    g = gap(work, 'fp32-1', other)
    say(f'{other}: {g:.1e} from one process, fp32, 20 steps')
    assert g<1e-6

@pytest.mark.parametrize('other', ['fp64-2', 'fp64-4', 'fp64+shard-2'])
def test_same_weights_in_float64(work, other, say):
    g = gap(work, 'fp64-1', other)
    say(f'{other}: {g:.1e} from one process, float64, 100 steps')
    assert torch.load(work/'fp64-1.pt', weights_only=True)['model']['x_embedder.proj.weight'].dtype==torch.float64
    assert g<1e-10

@pytest.mark.parametrize('n', [2])
def test_in_shards(work, n, say):
    "Clipped, in parts, with blocks computed twice, in shards: weights, pictures and losses of one process, and each holds its share."
    g = gap(work, 'clip-1', f'clip+shard-{n}')
    say(f'clip+shard-{n}: {g:.1e} from one process, fp32, 20 steps')
    assert g<1e-6
    one, mine = (torch.load(work/f'{f}-{k}.pt', weights_only=True) for f,k in (('clip', 1), ('clip+shard', n)))
    for at in ('first', 'then'):
        assert (one[at]['picture']-mine[at]['picture']).abs().max()<1e-4 and torch.allclose(one[at]['val'], mine[at]['val'], atol=1e-6)
    assert (one['first']['picture']-one['then']['picture']).abs().max()>1e-3, 'the average did not move'
    held = [int(v.split()[0]) for v in mine['numbers']]
    assert len(held)==n and sum(held)==int(one['numbers'][0].split()[0]) and max(held)<1.2*sum(held)/n

def test_overflow_in_one_shard(work):
    "All skip the step and all scalers fall alike."
    assert json.loads((work/'overflow.json').read_text())==['scale 32768 skipped 1 kept True moved True']

@pytest.mark.parametrize('n', [1, 2, 4])
def test_no_image_twice_or_missed(work, n):
    begun, ended = (torch.load(work/f'{f}.pt', weights_only=True)['seen'] for f in ('begin-2', f'go-on-{n}'))
    assert begun+ended==list(range(20*32))

@pytest.mark.parametrize('n', [2, 4])
def test_all_stop_at_one_step(work, n, say):
    "A signal to one process, or two, at a random moment: one step for all, and a whole checkpoint of it."
    found = json.loads((work/f'stop-{n}.json').read_text())
    for f in found:
        assert len(f['at'])==1 and f['at'][0].endswith('False'), f
        k = int(f['at'][0].split()[0])
        assert f['files']==[f'{k:07d}.pt'] and f['saved']==k and f['seen']>=k*32, f
    say(f'{n} processes stopped together at steps {", ".join(f["at"][0].split()[0] for f in found)}')
    assert len({f['at'][0] for f in found})>1

def test_one_is_killed(tmp_path):
    "The survivors leave with one line that names the rank, write nothing and do not hang."
    r = together(4, tmp_path, 'die', MIXMIX_TIMEOUT='20')
    assert r.returncode==1 and len(lines(r))==1 and 'rank 1 is gone' in lines(r)[0], r.stderr[-3000:]
    assert not [*tmp_path.rglob('*.pt')], 'a survivor wrote a checkpoint'

def test_one_is_silent(tmp_path):
    "The watch ends a process that would otherwise wait, in no collective that could fail."
    r = together(2, tmp_path, 'freeze', MIXMIX_TIMEOUT='4')
    assert r.returncode==1 and len(lines(r))==1 and 'rank 1 is gone: not a word' in lines(r)[0], r.stderr[-3000:]

def test_a_collective_has_a_time_out(tmp_path):
    "A process that lives and does not come is waited for so long, and no longer."
    r = together(2, tmp_path, 'sleep', MIXMIX_TIMEOUT='4')
    assert r.returncode==1 and len(lines(r))==1 and 'have waited 4 s for each other in vain (MIXMIX_TIMEOUT)' in lines(r)[0], r.stderr[-3000:]

@pytest.mark.parametrize('task, text', [('refuse', 'this cannot be'), ('fail', 'rank 1 failed: KeyError')])
def test_one_line_for_all(tmp_path, task, text):
    r = together(2, tmp_path, task, MIXMIX_TIMEOUT='20')
    assert r.returncode==1 and len(lines(r))==1 and text in lines(r)[0], r.stderr[-3000:]
    assert not [*tmp_path.iterdir()]
    assert ('exitcode  : 2' in r.stderr)==(task=='refuse'), r.stderr[-3000:]
