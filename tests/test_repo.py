"The package is what the notebooks export, the notebooks are clean, the README is the index, everything public is documented."
import ast, configparser, json, re, shutil
import pytest, yaml
from conftest import ROOT, python
from test_notebooks import NOTEBOOKS

MODULES = sorted(p for p in (ROOT/'mixmix_nb').glob('*.py') if p.name[0]!='_')

def settings():
    c = configparser.ConfigParser(delimiters=['='])
    c.read(ROOT/'settings.ini')
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

def test_export_is_up_to_date(copy):
    mine, theirs = ({p.name: p for p in (d/'mixmix_nb').glob('*.py')} for d in (ROOT, copy))
    assert mine.keys()==theirs.keys()
    stale = [n for n in mine if mine[n].read_text()!=theirs[n].read_text()]
    assert not stale, f'run nbdev_export: {stale}'

def test_notebooks_are_clean(copy):
    dirty = [str(p.relative_to(ROOT)) for p in NOTEBOOKS if p.read_text()!=(copy/p.relative_to(ROOT)).read_text()]
    assert not dirty, f'run nbdev_clean: {dirty}'

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_outputs_are_kept(nb):
    "Lesson cells have been run and keep what they show; no errors, warnings, paths of a machine, or styles of a progress bar."
    cells = [c for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='code' and ''.join(c['source']).strip()]
    shows = [c for c in cells if re.search(r'^(print\(|f[\'"]|fig, ax|show\()', ''.join(c['source']), re.M)]
    unrun = [c for c in shows if not c['outputs'] and not re.search(r'^#\|\s*(eval: *false|slow|cuda)', ''.join(c['source']), re.M)]
    assert not unrun, f'cells that were not run: {"".join(unrun[0]["source"])[:100]}'
    outputs = [o for c in cells for o in c['outputs']]
    assert outputs or nb.stem=='index', 'no outputs are kept'
    for o in outputs:
        text = json.dumps({k: v for k,v in o.items() if k!='data'}) + json.dumps({k: v for k,v in o.get('data', {}).items() if not k.startswith('image/')})
        assert o['output_type']!='error', 'a stored error'
        assert not re.search(r'/(root|home|work|tmp|opt|Users)/', text), f'a path of some machine: {text[:300]}'
        assert not re.search('Warning|<style>|<progress', text), f'a warning or a style block: {text[:300]}'

def test_readme_is_the_index():
    r = python(ROOT/'tools'/'readme.py', '--check', cwd=ROOT)
    assert r.returncode==0, r.stdout+r.stderr

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_badge_links_and_setup(nb):
    "Each notebook opens in Colab from this repository, a hidden cell installs the package, and every relative link leads somewhere."
    s, text = settings(), nb.read_text()
    assert f'https://colab.research.google.com/github/{s["user"]}/{s["repo"]}/blob/{s["branch"]}/{nb.relative_to(ROOT)}' in text
    cells = json.loads(text)['cells']
    setup = [''.join(c['source']) for c in cells if 'google.colab' in ''.join(c['source']) and c['cell_type']=='code']
    assert len(setup)==1 and setup[0].startswith('#| hide') and f'git+{s["git_url"]}' in setup[0]
    prose = '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='markdown')
    dead = [l for l in re.findall(r'\]\(([^)#\s]+)[^)]*\)', prose) if '://' not in l and not (nb.parent/l).exists()]
    assert not dead, f'dead links: {dead}'

def test_titles_agree():
    "A chapter has one title: on its page and in the index."
    index = (ROOT/'README.md').read_text()
    for p in NOTEBOOKS:
        if p.parent.name!='nbs' or not p.stem[0].isdigit(): continue
        title = ''.join(json.loads(p.read_text())['cells'][0]['source']).splitlines()[0].removeprefix('# ').strip()
        assert re.search(rf'\[(\d\d )?{re.escape(title)}\]\(nbs/{p.name}\)', index), f'{p.name}: {title!r} is not its title in the README'

def public_functions(path): # yields (name, ast node) of functions, methods and classes without a leading underscore
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0]!='_':
            yield node.name, node
            for m in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(m, ast.FunctionDef) and m.name[0]!='_' and m.name!='forward': yield f'{node.name}.{m.name}', m

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_everything_public_is_explained(path):
    "A docstring for each function, method and class; a comment for each parameter of a function with two or more."
    lines, bad = path.read_text().splitlines(), []
    for name,node in public_functions(path):
        if not ast.get_docstring(node): bad.append(f'{name}: no docstring')
        if isinstance(node, ast.ClassDef): node = next((m for m in node.body if getattr(m, 'name', '')=='__init__'), None)
        if node is None: continue
        args = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg!='self']
        if len(args)<2: continue
        by_line = {}
        for a in args: by_line.setdefault(a.end_lineno, []).append(a.arg)
        bad += [f'{name}: {", ".join(names)}' for n,names in by_line.items() if '#' not in lines[n-1]]
    assert not bad, bad

def test_size_and_shape():
    "Modules that a person can hold in the head: lines, public names, length of lines."
    bad = []
    for p in MODULES:
        text = p.read_text()
        names = re.findall(r"'(?![A-Z_]+')\w+'", re.search(r'__all__ = \[(.*?)\]', text, re.S)[1])
        long = [i for i,l in enumerate(text.splitlines(), 1) if len(l)>120 and not l.startswith('__all__')]
        if long: bad.append(f'{p.name}: lines above 120 characters: {long[:10]}')
        if len(text.splitlines())>300: bad.append(f'{p.name}: {len(text.splitlines())} lines')
        if len(names)>18: bad.append(f'{p.name}: {len(names)} public names')
    assert not bad, bad

@pytest.mark.parametrize('command', ['train', 'sample', 'coco', 'latents', 'interop', 'plan', 'benchmark'])
def test_help_imports_no_torch(command):
    code = f'''
import sys, runpy
sys.argv = ["x", "--help"]
try: runpy.run_module("mixmix_nb.{command}", run_name="__main__")
except SystemExit as e: assert e.code==0
heavy = [m for m in ("torch", "torchvision", "diffusers", "timm", "matplotlib", "sklearn", "numpy") if m in sys.modules]
assert not heavy, heavy'''
    r = python('-c', code, cwd=ROOT)
    assert r.returncode==0 and '--help' in r.stdout, r.stdout+r.stderr

def test_imports_run_downward():
    "A module imports only what comes before it; `cli` and `config`, which import no torch, may be imported by the commands."
    order = 'core patches conditioning blocks dit diffusion likelihood samplers flow images data datasets optim trainer runs checkpoints logs previews speed distributed vae latents resume foreign load finetune train bulk sample playground interop timing plan benchmark coco'.split()
    assert {p.stem for p in MODULES}=={*order, 'cli', 'config'}
    for p in MODULES:
        for name in re.findall(r'^ *from \.(\w+) import', p.read_text(), re.M):
            ok = name in ('cli', 'config') and p.stem in ('resume', 'train', 'load', 'finetune', 'sample', 'playground', 'latents', 'coco', 'interop', 'plan', 'benchmark') or p.stem=='config' and name in ('cli', 'core') or p.stem=='cli' and name=='core' \
                or p.stem not in ('cli', 'config') and name in order and order.index(name)<order.index(p.stem)
            assert ok, f'{p.stem} imports {name}'

def test_workflows_are_valid():
    "They cannot run here: at least they parse, name jobs with steps, and use the README's command and versions that are allowed."
    for f in (ROOT/'.github'/'workflows').glob('*.yml'):
        w = yaml.safe_load(f.read_text())
        assert {'name', 'jobs'}<=w.keys() and (True in w or 'on' in w), f
        for job in w['jobs'].values():
            assert job['runs-on'] and all('uses' in s or 'run' in s for s in job['steps']), f
    text = (ROOT/'.github'/'workflows'/'tests.yml').read_text()
    assert re.findall(r'```bash\n(?:#.*\n)?(.*)\n```', (ROOT/'README.md').read_text())[1] in text
    sidebar = yaml.safe_load((ROOT/'nbs'/'_quarto.yml').read_text())['website']['sidebar']['contents']
    listed = [c for s in sidebar for c in ([s] if isinstance(s, str) else s['contents'])]
    assert sorted(listed)==sorted(p.name for p in (ROOT/'nbs').glob('*.ipynb'))

def test_wheel_from_sdist_trains_and_samples(tmp_path):
    "Built as released: sdist, wheel from it, imported from outside of the checkout."
    src = tmp_path/'src'
    shutil.copytree(ROOT, src, ignore=shutil.ignore_patterns('.git', 'results', '__pycache__', '*.egg-info', '.venv', 'nbs', 'tests'))
    r = python('-m', 'build', '--no-isolation', src, cwd=tmp_path)
    assert r.returncode==0, r.stdout[-1000:]+r.stderr[-2000:]
    wheel, = (src/'dist').glob('*.whl')
    r = python('-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', tmp_path/'site', wheel, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    env = dict(PYTHONPATH=tmp_path/'site')
    code = 'import mixmix_nb; print(mixmix_nb.__file__)'
    assert str(tmp_path/'site') in python('-c', code, cwd=tmp_path, **env).stdout
    r = python('-m', 'mixmix_nb.train', '--steps', 2, '--num-sample-images', 0, cwd=tmp_path, **env)
    assert r.returncode==0, r.stderr
    r = python('-m', 'mixmix_nb.sample', '--ckpt', 'results/000-DiT-N-2', '--num-sampling-steps', 2, cwd=tmp_path, **env)
    assert r.returncode==0 and (tmp_path/'samples.png').exists(), r.stderr
    r = python('-m', 'mixmix_nb.sample', '--ckpt', 'fashion-mnist', '--num-sampling-steps', 2, '--out', 'clothes', cwd=tmp_path, **env)
    assert r.returncode==0 and (tmp_path/'clothes.png').exists(), r.stderr
    scripts = (tmp_path/'site').glob('*.dist-info/entry_points.txt')
    assert 'mixmix-train' in next(scripts).read_text()
