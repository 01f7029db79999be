"Models in and out: every kind of file, fine-tuning, downloads by name, diffusers, the hub."
import argparse, functools, http.server, json, os, threading
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from safetensors.torch import save_file
from conftest import python
from test_commands import Evil
from mixmix_nb import flow, foreign, interop, load
from mixmix_nb.core import DATASETS, UserError
from mixmix_nb.data import TensorData
from mixmix_nb.dit import dit
from mixmix_nb.images import DataInfo
from mixmix_nb.interop import from_pretrained, push_to_hub, save_pretrained, to_diffusers
from mixmix_nb.finetune import fit_weights, read_source
from mixmix_nb.foreign import facts_from_weights, official_names
from mixmix_nb.load import build_model, build_objective, load_model, save_weights
from mixmix_nb.samplers import ddim
from mixmix_nb.checkpoints import check_weights
from mixmix_nb.train import train

SHORT = dict(data_path='latents4', num_sample_images=0, batch_size=4, num_workers=0)

def random_dit(variant='S/8', **kwargs): # with the official layout, and output that is not zero
    torch.manual_seed(0)
    model = dit(variant, **dict(input_size=32, num_classes=1000) | kwargs)
    for p in model.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.05)
    return model.eval()

@pytest.fixture
def latents(monkeypatch): # random latents of the released models' shape as a named dataset
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 4, 32, 32, generator=g), torch.arange(16)%3
    monkeypatch.setitem(DATASETS, 'latents4', lambda: TensorData(x, y, DataInfo('latents4', (4, 32, 32), ['a', 'b', 'c'])))

def outputs(model): # at several timesteps
    g = torch.Generator().manual_seed(1)
    with torch.no_grad(): return model(torch.randn(3, *[model.in_channels], *model.input_size, generator=g), torch.tensor([0., 400., 999.]), torch.tensor([0, 1, 2]))

def save_kind(kind, model, path): # write the weights of a model as `kind` of file
    state, args = model.state_dict(), dict(num_classes=1000, vae='ema', global_seed=0)
    script = lambda s, **more: dict(model={k: 0*v for k,v in s.items()}, ema=s, opt=dict(state={}, param_groups=[]), args=argparse.Namespace(**args, **more))
    sit = dict(model='SiT-S/8', path_type='Linear', prediction='velocity')
    if kind=='bare': return torch.save(state, path)
    if kind=='dit': return torch.save(script(state, model='DiT-S/8'), path)
    if kind=='ddp': return torch.save(script({f'module._orig_mod.{k}': v for k,v in state.items()}, model='DiT-S/8'), path)
    if kind=='sit': return torch.save(script(state, **sit), path)
    if kind=='repa': return torch.save(script(state | {'projectors.0.0.bias': torch.zeros(3)}, **sit | dict(prediction='v', path_type='linear')), path)
    save_file(state, path)

@pytest.mark.parametrize('kind,objective,tuned', [('bare', 'ddpm', False), ('dit', 'ddpm', True), ('ddp', 'ddpm', False), ('sit', 'sit', False), ('repa', 'repa', False), ('safetensors', 'ddpm', False)])
def test_every_kind_of_file(kind, objective, tuned, latents, tmp_path, monkeypatch):
    "Loaded weights equal a DiT built by hand; official layouts are sampled, fine-tuned on other classes, saved, and loaded again."
    monkeypatch.chdir(tmp_path)
    size = 'S/8' if tuned else 'N/8'
    by_hand, file = random_dit(size), 'w.safetensors' if kind=='safetensors' else 'w.pt'
    save_kind(kind, by_hand, file)
    model, args, facts = load_model(file, given=dict(ignore_weights='projectors.*'))
    assert torch.equal(outputs(model), outputs(by_hand))
    assert (args.model, args.objective, facts['num_classes'], facts['learn_sigma'], facts['vae']) == (f'DiT-{size}', objective, 1000, True, 'ema')
    if kind=='dit': assert not load_model(file, weights='model')[0].final_layer.linear.weight.any()
    if not tuned: return
    x = ddim(build_objective(args, (4, 32, 32)), model, lambda: torch.randn(1, 4, 32, 32), torch.tensor([7]), steps=2)
    assert x.isfinite().all()
    run = train(init_from=file, steps=20, lr=1e-4, **SHORT | dict(batch_size=2))
    assert '1000' not in (run/'log.txt').read_text() and '3 new classes' in (run/'log.txt').read_text()
    a = load_model(run)[0]
    save_weights(run, 'again.safetensors', dtype=torch.float32)
    assert torch.equal(outputs(load_model('again.safetensors')[0]), outputs(a)) and not torch.equal(outputs(a), outputs(model))

def diffusers_dit(): # the class
    import diffusers
    if not hasattr(diffusers, 'DiTTransformer2DModel'): pytest.skip('diffusers is too old')
    return diffusers.DiTTransformer2DModel

def test_released_sizes_by_shape():
    "XL/2, ours and diffusers', without memory for the weights."
    DiTTransformer2DModel = diffusers_dit()
    with torch.device('meta'):
        state = dit('XL/2', input_size=32).state_dict()
        args, facts = facts_from_weights(state, {})
        theirs = DiTTransformer2DModel(sample_size=32, num_layers=28, out_channels=8)
        model = build_model(argparse.Namespace(**vars(load.Config()) | args), facts)
    assert (args['model'], facts['shape'], facts['num_classes'], facts['image_size']) == ('DiT-XL/2', [4, 32, 32], 1000, 256)
    check_weights(model, state)
    check_weights(model, official_names(theirs.state_dict(), theirs.config))

def test_layout_of_the_released_folders(tmp_path):
    "As on the hub: an older name of the class, a .bin, names with commas; classes, autoencoder and prediction come from the folder."
    torch.manual_seed(0)
    net = diffusers_dit()(num_attention_heads=4, attention_head_dim=32, out_channels=8, num_layers=4, sample_size=8, patch_size=4, num_embeds_ada_norm=3)
    state = {k: v for k,v in net.state_dict().items()}
    for k in state: # the embeddings of each block are copies
        if '.emb.' in k: state[k] = state['transformer_blocks.0'+k[k.index('.norm1'):]]
    for d in ('transformer', 'scheduler', 'vae'): (tmp_path/d).mkdir()
    torch.save(state, tmp_path/'transformer'/'diffusion_pytorch_model.bin')
    notes = {'transformer/config.json': {k: v for k,v in net.config.items() if k[0]!='_'} | dict(_class_name='Transformer2DModel'), 'vae/config.json': {},
             'scheduler/scheduler_config.json': dict(prediction_type='v_prediction', beta_schedule='squaredcos_cap_v2'),
             'model_index.json': dict(id2label={'1': 'goldfish, Carassius auratus', '0': 'tench', '2': 'shark'})}
    for name,note in notes.items(): (tmp_path/name).write_text(json.dumps(note))
    model, args, facts = load_model(tmp_path)
    assert (args.prediction, args.schedule, facts['vae'], facts['classes'][1]) == ('v', 'cosine', str(tmp_path/'vae'), 'goldfish, Carassius auratus')
    assert torch.equal(model.blocks[1].attn.qkv.weight[128:256], state['transformer_blocks.1.attn1.to_k.weight'])
    (tmp_path/'transformer'/'diffusion_pytorch_model.bin').unlink()         # several files, and a variant beside them
    names = sorted(state)
    for i,part in enumerate((names[::2], names[1::2]), 1): torch.save({k: state[k] for k in part}, tmp_path/'transformer'/f'diffusion_pytorch_model-0000{i}-of-00002.bin')
    torch.save({k: 0*v for k,v in state.items()}, tmp_path/'transformer'/'diffusion_pytorch_model.fp16.bin')
    assert all(torch.equal(a, b) for a,b in zip(load_model(tmp_path)[0].parameters(), model.parameters()))
    (tmp_path/'transformer'/'diffusion_pytorch_model-00001-of-00002.bin').unlink()
    with pytest.raises(UserError, match='the transformer lacks'): load_model(tmp_path)
    state['transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight'] = torch.zeros(4, 128)
    torch.save(state, tmp_path/'transformer'/'diffusion_pytorch_model.bin')
    with pytest.raises(UserError, match='one embedding for all blocks'): load_model(tmp_path)

@pytest.mark.parametrize('change', [dict(), dict(objective='flow'), dict(learn_sigma=False), dict(num_classes=0)], ids=str)
def test_fine_tuning_starts_where_the_source_was(change, latents, tmp_path, monkeypatch):
    "Whatever changes, the null class predicts at first what it predicted in the source."
    monkeypatch.chdir(tmp_path)
    source = random_dit('N/8')
    torch.save(source.state_dict(), 'w.pt')
    run = train(init_from='w.pt', steps=1, lr=1e-12, **SHORT | change)
    model, args, facts = load_model(run, weights='model')
    x, t = torch.randn(2, 4, 32, 32), torch.tensor([300., 500.])
    with torch.no_grad(): a, b = model(x, t, torch.full((2,), 3))[:,:4], source(x, t, torch.full((2,), 1000))[:,:4]
    assert model.out_channels==(4 if change.keys()&{'objective', 'learn_sigma'} else 8) and (args.prediction or 'eps')=='eps'
    assert torch.allclose(a, b, atol=1e-4)!=(args.objective=='flow')            # a flow counts its time in another way

@pytest.mark.parametrize('objective', [flow.REPAFlow(), flow.SiTFlow()], ids=lambda o: type(o).__name__)
def test_other_times_mean_the_same(objective):
    "From 1000·t to times in [0,1], and SiT's sign: the same clean images in fp32, with weights that stay small."
    source = read_source(dict(init_from='fashion-mnist'))
    before, args, facts = load_model('fashion-mnist')
    after, _, _ = load_model('fashion-mnist')
    note, = fit_weights(after, objective, facts, source)
    x, t, y = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.linspace(.05, .95, 64), torch.arange(64)%10
    with torch.no_grad(): a, b = (o.denoise(m, x, t, y).x0 for o,m in ((flow.Flow(), before), (objective, after)))
    assert (a-b).square().mean()<.05*a.square().mean() and 'timesteps refitted' in note and 'lost' not in note
    assert after.t_embedder.mlp[2].weight.abs().max()<1000

def test_other_sizes_and_resume_without_the_file(latents, tmp_path, monkeypatch):
    "Another image size; frozen weights stay, as do those with a learning rate of 0; a resumed run needs no source and ends as an uninterrupted one."
    monkeypatch.chdir(tmp_path)
    source = random_dit('N/8', input_size=16)
    torch.save(source.state_dict(), 'w.pt')
    options = dict(init_from='w.pt', freeze='blocks.[0-2].*', lr_mult='t_embedder.*=0', lr=1e-3, **SHORT)
    whole = train(steps=4, **options)
    assert '4×4 patches' in (whole/'log.txt').read_text()
    part = train(steps=2, **options)
    Path('w.pt').unlink()
    train(resume=str(part), steps=4)
    a, b = (load_model(r, weights='model')[0].state_dict() for r in (whole, part))
    assert all(torch.equal(a[k], b[k]) for k in a)
    frozen = [k for k,v in source.state_dict().items() if k in a and a[k].shape==v.shape and torch.equal(a[k], v)]
    assert {k.split('.')[1] for k in frozen if k.startswith('blocks')}=={'0', '1', '2'} and 't_embedder.mlp.2.weight' in frozen

@pytest.mark.parametrize('options,words', [
    (dict(init_from='nothing.pt'), 'does not exist'), (dict(init_from='w.pt', resume='auto'), 'pass only one of the two'), (dict(init_from='evil.pt'), 'could run a program'),
    (dict(init_from='truncated.pt'), 'truncated'), (dict(init_from='other.pt'), 'not the weights of a DiT'), (dict(init_from='extra.pt'), '--ignore-weights "projectors*"'),
    (dict(init_from='w.pt', model='DiT-N/4'), 'x_embedder.proj.weight: 128x4x8x8 in the checkpoint'), (dict(init_from='empty'), 'no readable checkpoint'),
    (dict(init_from='half'), 'transformer/config.json is missing'), (dict(init_from='table.pt'), 'y_embedder.embedding_table.weight: 7x128 in the checkpoint'), (dict(init_from='gvp.pt'), 'only velocities on linear paths'), (dict(init_from='raw.pt'), "no 'ema' weights, only 'model'"), (dict(init_from='holes.safetensors'), 'pos_embed: missing'),
    (dict(init_from='w.pt', freeze='head.*'), '--freeze head.* matches no weights'), (dict(init_from='w.pt', freeze='*'), 'leaves nothing to train'),
    (dict(init_from='w.pt', lr_mult='y_embedder.*'), '--lr-mult must look like'),
], ids=lambda o: ','.join(map(str, o.values())) if isinstance(o, dict) else '')
def test_bad_input(options, words, latents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = random_dit('N/8', num_classes=9).state_dict()
    torch.save(state, 'w.pt')
    torch.save(state | {'projectors.0.bias': torch.zeros(3)}, 'extra.pt')
    torch.save(dict(ema=state | {'y_embedder.embedding_table.weight': torch.zeros(7, 128)}, args=argparse.Namespace(num_classes=9)), 'table.pt')
    torch.save(dict(ema=state, args=argparse.Namespace(model='SiT-N/8', path_type='GVP', prediction='velocity')), 'gvp.pt')
    torch.save(dict(model=state, opt={}), 'raw.pt')
    save_weights('w.pt', 'whole.safetensors')
    with safe_open('whole.safetensors', 'pt') as f: save_file({k: f.get_tensor(k) for k in f.keys() if k!='pos_embed'}, 'holes.safetensors', f.metadata())
    torch.save(dict(conv=torch.zeros(3)), 'other.pt')
    torch.save(dict(ema=state, args=Evil(os.mkdir, 'pwned')), 'evil.pt')
    Path('truncated.pt').write_bytes(Path('w.pt').read_bytes()[:9000])
    for d in ('empty', 'half'): Path(d).mkdir()
    Path('half/model_index.json').write_text('{}')
    before = sorted(os.listdir())
    with pytest.raises(UserError) as e: train(steps=1, **SHORT | options)
    assert words in str(e.value) and e.value.status==2, e.value
    assert sorted(os.listdir())==before, 'nothing may be written'

class Server(http.server.SimpleHTTPRequestHandler):
    "Serves a folder with ranges, and breaks off the first answer in the middle."
    asked = []
    def do_GET(self):
        data, start = Path(self.directory, self.path[1:]).read_bytes(), int((self.headers['Range'] or 'bytes=0-')[6:-1])
        self.asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(data)-start))
        self.end_headers()
        self.wfile.write(data[start:] if start else data[:len(data)//2])
    def log_message(self, *args): pass

def test_download_by_name(tmp_path, monkeypatch):
    "A mirror that is gone is passed over; an interrupted download is continued, not begun again; the second call needs no network."
    (tmp_path/'there').mkdir()
    model = random_dit('N/8')
    torch.save(model.state_dict(), tmp_path/'there'/'x.pt')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Server, directory=tmp_path/'there'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    monkeypatch.setenv('MIXMIX_CACHE', str(tmp_path/'cache'))
    monkeypatch.setitem(foreign.RELEASED, 'DiT-X', ['http://127.0.0.1:9/x.pt', f'http://127.0.0.1:{port}/x.pt'])
    with pytest.raises(UserError, match='DiT-X could not be downloaded'): load_model('DiT-X')
    assert torch.equal(outputs(load_model('DiT-X')[0]), outputs(model))
    assert Server.asked[0]==0 and Server.asked[1]>0 and len(Server.asked)==2
    data = bytearray((tmp_path/'there'/'x.pt').read_bytes())
    data[len(data)//2] ^= 1                                                 # one bit, which torch.load does not notice
    (tmp_path/'there'/'bad.pt').write_bytes(data)
    (tmp_path/'there'/'page.pt').write_text('<html>moved</html>')
    address = f'http://127.0.0.1:{port}/'
    for name,mirrors in (('DiT-Y', ['bad.pt', 'page.pt']), ('DiT-Z', ['bad.pt', 'page.pt', 'x.pt'])):
        monkeypatch.setitem(foreign.RELEASED, name, [address+m for m in mirrors for _ in range(2)])
    with pytest.raises(UserError, match='is damaged.*not a zip'): load_model('DiT-Y')
    assert not list((tmp_path/'cache').rglob('DiT-Y*'))
    assert torch.equal(outputs(load_model('DiT-Z')[0]), outputs(model))
    server.shutdown()
    load_model('DiT-X')

@pytest.mark.parametrize('options', [dict(), dict(schedule='cosine', prediction='x0'), dict(objective='flow', prediction='x0')], ids=str)
def test_diffusers_folder(options, latents, tmp_path, monkeypatch):
    "Every timestep to 1e-5 with the null class at 1000, and back; in a process without us, a message that names us."
    diffusers_dit()
    monkeypatch.chdir(tmp_path)
    torch.save(random_dit('N/8', num_classes=3).state_dict(), 'w.pt')
    run = train(init_from='w.pt', steps=1, vae=None, **SHORT | options)
    from diffusers import DiTPipeline
    out = interop.interop(ckpt=str(run), out='folder')
    pipe = DiTPipeline.from_pretrained(out)
    model, args, facts = load_model(run)
    objective, x = build_objective(args, (4, 32, 32)), torch.randn(999, 4, 32, 32)
    t, y = torch.arange(1, 1000), torch.arange(1, 1000)%4
    with torch.no_grad():
        theirs = pipe.transformer(x, t, y+997*(y==3)).sample
        if args.objective=='flow': e = objective.denoise(model, x, t/1000, y); ours = e.eps-e.x0
        else: ours = model(x, t, y)
    assert (theirs-ours).abs().max()<1e-5*ours.abs().max()
    assert all(torch.equal(a, b) for a,b in zip(load_model('folder')[0].parameters(), model.parameters()))
    assert set(pipe.labels)=={'a', 'b', 'c'}
    if options: return
    r = python('-c', 'from diffusers import DiTPipeline; DiTPipeline.from_pretrained("folder")', cwd=tmp_path)
    assert r.returncode and 'mixmix_nb.interop' in r.stderr.splitlines()[-1]

def test_hub(tmp_path, monkeypatch):
    "A local folder needs no network; what is uploaded is that folder; a wrong name gives one line."
    monkeypatch.chdir(tmp_path)
    run = train(steps=2, num_sample_images=2, num_sampling_steps='2', ckpt_every=1)
    uploaded = {}
    import huggingface_hub
    class Api:
        def create_repo(self, name, **kw): uploaded['name'] = name
        def upload_folder(self, repo_id, folder_path): uploaded['files'] = sorted(os.listdir(folder_path))
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    push_to_hub(run, 'me/digits')
    assert uploaded==dict(name='me/digits', files=['README.md', 'config.json', 'model.safetensors', 'samples.png'])
    save_pretrained(run, 'out')
    assert all(torch.equal(a, b) for a,b in zip(from_pretrained('out')[0].parameters(), load_model(run)[0].parameters()))
    with pytest.raises(UserError, match='the hub says'): from_pretrained('me/nothing')
    with pytest.raises(UserError, match='not an empty folder'): to_diffusers(run, 'out')
