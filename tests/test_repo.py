"The package is what the notebooks export, the notebooks are clean, the README is the index, and the badges point here."
import configparser, filecmp, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT, python
from test_notebooks import NOTEBOOKS

def settings():
    c = configparser.ConfigParser(delimiters=['=']); c.read(ROOT/'settings.ini')
    return c['DEFAULT']

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project in which nbdev_export and nbdev_clean have run."
    d = tmp_path_factory.mktemp('copy')/'mixmix_nb'
    shutil.copytree(ROOT, d, ignore=shutil.ignore_patterns('.git', 'results', '__pycache__', '*.egg-info', '.venv', '_docs', '_proc'))
    for cmd in ('from nbdev.doclinks import nbdev_export as f', 'from nbdev.clean import nbdev_clean as f'):
        r = python('-c', f'{cmd}; f()', cwd=d)
        assert r.returncode==0, r.stderr
    return d

def test_export_is_in_step(copy):
    mine, theirs = ({p.name: p for p in (d/'mixmix_nb').glob('*.py')} for d in (ROOT, copy))
    assert mine.keys()==theirs.keys()
    stale = [n for n in mine if mine[n].read_text()!=theirs[n].read_text()]
    assert not stale, f'run nbdev_export: {stale}'

def test_notebooks_are_clean(copy):
    dirty = [str(p.relative_to(ROOT)) for p in NOTEBOOKS if p.read_text()!=(copy/p.relative_to(ROOT)).read_text()]
    assert not dirty, f'run nbdev_clean: {dirty}'

def test_outputs_are_kept_without_errors_and_machine_paths():
    for p in NOTEBOOKS:
        for c in json.loads(p.read_text())['cells']:
            for o in c.get('outputs', []):
                text = json.dumps({k: v for k,v in o.items() if k!='data'}) + json.dumps({k: v for k,v in o.get('data', {}).items() if not k.startswith('image/')})
                assert o['output_type']!='error', f'{p.name}: a stored error'
                assert not re.search(r'/(root|home|work|tmp|opt|Users)/', text), f'{p.name}: a path of some machine: {text[:300]}'
                assert 'Warning' not in text, f'{p.name}: a warning: {text[:300]}'

def test_readme_is_the_index():
    r = python(ROOT/'tools'/'readme.py', '--check', cwd=ROOT)
    assert r.returncode==0, r.stdout+r.stderr

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_badge_and_setup(nb):
    "Each notebook opens in Colab: owner, repository and branch are those of settings.ini, and a hidden cell installs the package."
    s, text = settings(), nb.read_text()
    url = f'https://colab.research.google.com/github/{s["user"]}/{s["repo"]}/blob/{s["branch"]}/{nb.relative_to(ROOT)}'
    assert url in text
    setup = [''.join(c['source']) for c in json.loads(text)['cells'] if 'google.colab' in ''.join(c['source']) and c['cell_type']=='code']
    assert len(setup)==1 and setup[0].startswith('#| hide') and f'git+{s["git_url"]}' in setup[0]

def test_every_public_function_is_explained():
    "Docstring and a comment a parameter for everything public (methods too)."
    code = '''
import importlib, inspect, sys, fastcore.docments as d
bad = []
for m in "core data latents patches conditioning blocks models diffusion samplers training speed distributed train sample coco".split():
    mod = importlib.import_module("mixmix_nb."+m)
    for n in mod.__all__:
        f = getattr(mod, n)
        if getattr(f, "__module__", "")!=mod.__name__ or not (inspect.isfunction(f) or inspect.isclass(f)): continue
        if not (f.__doc__ or "").strip() or f.__doc__.startswith(n+"("): bad.append(f"{m}.{n}: no docstring")
        if not inspect.isfunction(f) or len(inspect.signature(f).parameters)<2: continue
        bad += [f"{m}.{n}: {p}" for p,x in d.docments(f, full=True, returns=False).items() if not x.docment and p not in ("self","args","kwargs","lo")]
print("\\n".join(bad)); sys.exit(bool(bad))'''
    r = python('-c', code, cwd=ROOT)
    assert r.returncode==0, r.stdout+r.stderr

@pytest.mark.parametrize('command', ["train", "sample", "coco", "latents"])
def test_help_imports_no_torch(command):
    code = f'''
import sys, runpy; sys.argv = ["x", "--help"]
try: runpy.run_module("mixmix_nb.{command}", run_name="__main__")
except SystemExit as e: assert e.code==0
heavy = [m for m in ("torch", "torchvision", "diffusers", "timm", "matplotlib", "sklearn", "numpy") if m in sys.modules]
assert not heavy, heavy'''
    r = python('-c', code, cwd=ROOT)
    assert r.returncode==0 and '--help' in r.stdout, r.stdout+r.stderr

def test_a_run_imports_only_what_it_uses(tmp_path):
    "Training on the digits needs neither diffusers nor timm, torchvision or all of scikit-learn, nor PyTorch's compiler."
    code = '''
import sys; from mixmix_nb.train import main
main("--steps 2 --num-sample-images 2 --sample-steps 2".split())
heavy = [m for m in ("torchvision", "diffusers", "timm", "sklearn", "torch._dynamo", "ipywidgets", "IPython", "nbdev") if m in sys.modules]
assert not heavy, heavy'''
    r = python('-c', code, cwd=tmp_path)
    assert r.returncode==0, r.stdout+r.stderr
