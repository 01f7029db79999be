"Every notebook is a test: run by nbdev_test in a process of its own, with a time limit."
import nbformat, pytest
from conftest import ROOT, forked, python

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(d.startswith(('.','_')) for d in p.relative_to(ROOT).parts))
LIMIT = 300         # seconds; a chapter takes well under a minute on two idle cores
# called as a function: from `python -c` its command line is not read, and it would run every notebook
RUN = 'import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], n_workers=0, do_print=True)'

def run(nb):
    how = python if nb=='nbs/index.ipynb' else forked               # the shortest in an interpreter of its own
    return how('-c', RUN, nb, cwd=ROOT, timeout=LIMIT)

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

def test_there_are_chapters():
    names = {p.stem for p in NOTEBOOKS if p.parent.name=='nbs'}
    assert {'index','00_core','01_data','02_latents','03_patches','04_conditioning','05_blocks','06_dit','07_diffusion','08_sampling','09_training','10_speed','11_distributed','12_train','13_sample','14_coco'} <= names
    assert {p.stem for p in NOTEBOOKS if p.parent.name=='solutions'} >= {n for n in names if n[0].isdigit()}
