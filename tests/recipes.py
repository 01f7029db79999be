"""What makes digits digits soonest: train the recipes one after the other, judge each, write nbs/recipes.csv.

    python tests/recipes.py        (minutes each on a CPU)

All see the same 51,200 images. `agreement`: fraction of 500 samples without guidance that a classifier reads as the label asked for; `frechet`: distance in its features.
"""
import csv, tempfile
from pathlib import Path
from judge import judge_run, train_reader
from mixmix_nb.train import train

ROOT = Path(__file__).parent.parent
BIG, SMALL = dict(batch_size=64, steps=800), dict(batch_size=32, steps=1600)
PLAIN, COSINE_LR = dict(lr=1e-3, warmup=0, lr_schedule='constant'), dict(lr=3e-3, warmup=50, lr_schedule='cosine')
RECIPES = {
    "DiT's objective: ε, learned variance": dict(prediction='eps', schedule='linear', **BIG, **PLAIN),
    'fixed variance': dict(prediction='eps', learn_sigma=False, schedule='linear', **BIG, **PLAIN),
    'v instead of ε': dict(prediction='v', schedule='linear', **BIG, **PLAIN),
    '+ cosine noise schedule': dict(prediction='v', schedule='cosine', **BIG, **PLAIN),
    '+ higher learning rate that falls': dict(prediction='v', schedule='cosine', **BIG, **COSINE_LR),
    '+ twice the steps of half the batch': dict(prediction='v', schedule='cosine', **SMALL, **COSINE_LR),
    'the same with x₀ instead of v': dict(prediction='x0', schedule='cosine', **SMALL, **COSINE_LR),
}

def judged(name, # a key of `RECIPES`
           reader, # from `train_reader`
          ): # dict, a row of the table
    "Train one recipe and judge its samples."
    o = RECIPES[name]
    with tempfile.TemporaryDirectory() as tmp:
        run = train(**o, results_dir=tmp, num_sample_images=0, ckpt_every=10**6, log_every=400)
        s = judge_run(Path(run)/'checkpoints'/'final.pt', reader=reader)
    return dict(recipe=name, prediction=o['prediction'], schedule=o['schedule'], batch=o['batch_size'], steps=o['steps'],
                agreement=round(s['agreement'], 3), frechet=round(s['frechet'], 1))

def write(rows): # the table
    with open(ROOT/'nbs'/'recipes.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, rows[0].keys(), lineterminator='\n'); w.writeheader(); w.writerows(rows)

if __name__=='__main__':
    reader = train_reader()
    write([judged(name, reader) for name in RECIPES])
