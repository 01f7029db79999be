"""What makes digits digits soonest: one change per row, three seeds, at equal images and at equal time.

    python tests/recipes.py [--seeds 0 1 2]     (half an hour on two CPU cores; continues where it was stopped)

Writes nbs/recipes.csv, a line per recipe, seed and number of network calls. All rows share the model, the optimizer and
the 51,200 images of the built-in run; `budget` is `images`, or `time` where a recipe whose step takes longer gets fewer
steps. `agreement`: fraction of 500 samples without guidance that a classifier reads as the label asked for; `frechet`:
distance in its features, 7 between two halves of the real digits.
"""
import argparse, csv, statistics, tempfile
from pathlib import Path
import torch
from torch.utils.benchmark import timer
from judge import judge_run, train_reader
from mixmix_nb.config import RECIPES as BUILT_IN, make_config
from mixmix_nb.data import batches
from mixmix_nb.datasets import load_digits
from mixmix_nb.trainer import SingleProcess
from mixmix_nb.load import build_objective
from mixmix_nb.train import get_facts, make_trainer, train

FILE = Path(__file__).parent.parent/'nbs'/'recipes.csv'
SHARED = {k: BUILT_IN['digits'][k] for k in ('model', 'batch_size', 'steps', 'lr', 'warmup', 'lr_schedule', 'ema_decay')}
DDPM, FLOW = dict(objective='ddpm', schedule='linear'), dict(objective='flow', prediction='v', time_sampling='uniform')
RECIPES = {                                             # the comment says which row differs in one thing
    'DiT as published: ε, learned variance': DDPM | dict(prediction='eps', learn_sigma=True),
    'ε, fixed variance': DDPM | dict(prediction='eps', learn_sigma=False),                          # the first
    'v': DDPM | dict(prediction='v', learn_sigma=False),                                            # ε
    'x₀': DDPM | dict(prediction='x0', learn_sigma=False),                                          # ε
    'v, cosine schedule': DDPM | dict(prediction='v', learn_sigma=False, schedule='cosine'),        # v
    'flow, v': FLOW,                                                                                # v
    'flow, x₀, loss on v': FLOW | dict(prediction='x0', v_loss=True),                               # flow, v
    'flow, v, logit-normal': FLOW | dict(time_sampling='logit-normal'),                             # flow, v
    'flow, x₀, loss on v, logit-normal': FLOW | dict(prediction='x0', v_loss=True, time_sampling='logit-normal'),
}
CALLS = 5, 10, 25, 50

def step_times(rounds=200): # dict: milliseconds a step of each recipe, medians, in turns in one process
    data, device, steps = load_digits(), torch.device('cpu'), {}
    for name,o in RECIPES.items():
        config = make_config(dict(SHARED, **o))
        objective = build_objective(config, data.info.shape)
        trainer, _ = make_trainer(config, get_facts(config, data, 'none', objective), data, objective, device, SingleProcess())
        steps[name] = lambda t=trainer, s=batches(data, seed=0, batch=32, start=0, stop=10**6): t.train_step(*next(s)[:2])
    def seconds(step):
        start = timer()
        step()
        return timer()-start
    found = [{k: seconds(step) for k,step in steps.items()} for _ in range(rounds+5)][5:]
    return {k: 1e3*statistics.median(r[k] for r in found) for k in steps}

def judged(name, seed, budget, steps, ms, reader): # lines of the table
    with tempfile.TemporaryDirectory() as tmp:
        o = SHARED | RECIPES[name] | dict(seed=seed, steps=steps)
        run = train(**o, results_dir=tmp, num_sample_images=0, ckpt_every=10**6, log_every=10**6)
        for n in CALLS:
            s = judge_run(run/'checkpoints'/'final.pt', reader=reader, sampler='ddim', steps=n)
            yield dict(recipe=name, seed=seed, budget=budget, steps=steps, ms_per_step=round(ms, 1), calls=n,
                       agreement=round(s['agreement'], 3), frechet=round(s['frechet'], 1))

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    seeds = p.parse_args().seeds
    rows = list(csv.DictReader(open(FILE))) if FILE.exists() else []
    done = {(r['recipe'], int(r['seed']), r['budget']) for r in rows}
    ms = {r['recipe']: float(r['ms_per_step']) for r in rows}
    if len(ms)<len(RECIPES): ms = step_times()
    reader, base, n = train_reader(), ms['ε, fixed variance'], SHARED['steps']
    jobs = [(name, 'images', n) for name in RECIPES]
    jobs += [(name, 'time', round(n*base/ms[name])) for name in RECIPES if abs(ms[name]/base-1)>.03]
    for name,budget,steps in jobs:
        for seed in seeds:
            if (name, seed, budget) in done: continue
            rows += judged(name, seed, budget, steps, ms[name], reader)
            with open(FILE, 'w', newline='') as f:
                w = csv.DictWriter(f, rows[0].keys(), lineterminator='\n')
                w.writeheader()
                w.writerows(rows)

if __name__=='__main__': main()
