"Every notebook is a test: run by nbdev_test in a process of its own, with a time limit."
import nbformat, pytest
from conftest import ROOT, python

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(d.startswith(('.','_')) for d in p.relative_to(ROOT).parts))
LIMIT = 400         # seconds; a chapter takes under a minute on two idle cores
# called as a function: from `python -c` its command line is not read, and it would run every notebook
RUN = 'import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], n_workers=0, do_print=True)'

def run(nb): return python('-c', RUN, nb, cwd=ROOT, timeout=LIMIT)

@pytest.mark.parametrize('nb', [str(p.relative_to(ROOT)) for p in NOTEBOOKS])
def test_notebook(nb):
    r = run(nb)
    out = r.stdout+r.stderr
    assert r.returncode==0 and 'Success' in out, out[-3000:]
    assert out.count('- Completed ')==1, f'not exactly one notebook was run:\n{out}'

def test_a_failing_cell_fails(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# A'), nbformat.v4.new_code_cell('assert 1==2')])
    nbformat.write(nb, tmp_path/'bad.ipynb')
    r = run(tmp_path/'bad.ipynb')
    assert r.returncode!=0 and 'assert 1==2' in r.stdout+r.stderr

def test_every_chapter_has_solutions():
    stems = lambda d: {p.stem for p in d.glob('[0-9]*.ipynb')}
    assert len(stems(ROOT/'nbs'))>=20 and stems(ROOT/'nbs')<=stems(ROOT/'nbs'/'solutions')
