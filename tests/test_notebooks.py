"Every notebook is a test: run by nbdev_test in a process of its own, with a time limit."
import shutil, sys
from pathlib import Path
import pytest
from conftest import ROOT, python

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(d.startswith(('.','_')) for d in p.relative_to(ROOT).parts))
LIMIT = 300         # seconds; a chapter takes well under a minute on two idle cores
SLOW_FIRST = ('08', '09', '12', '13', '05')

def weight(p): return (p.parent.name=='solutions', not p.name.startswith(SLOW_FIRST), p.name)

@pytest.mark.parametrize('nb', [str(p.relative_to(ROOT)) for p in sorted(NOTEBOOKS, key=weight)])
def test_notebook(nb):
    r = python('-c', 'from nbdev.test import nbdev_test; nbdev_test()', '--path', nb, '--n_workers', '0', '--timing', cwd=ROOT, timeout=LIMIT)
    out = r.stdout+r.stderr
    assert r.returncode==0 and 'Success' in out, out[-3000:]
    assert 'No files were eligible' not in out     # nbdev_test is content with a path that holds nothing

def test_there_are_chapters():
    names = {p.stem for p in NOTEBOOKS if p.parent.name=='nbs'}
    assert {'index','00_core','01_data','03_patches','04_conditioning','05_blocks','06_dit','07_diffusion','08_sampling','09_training','12_train','13_sample'} <= names
    assert {p.stem for p in NOTEBOOKS if p.parent.name=='solutions'} >= {n for n in names if n[0].isdigit()}
