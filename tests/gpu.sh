#!/usr/bin/env bash
# Everything that only a GPU can show, in about ten minutes on one card: the tests that are skipped elsewhere, speed beside the
# others, the training rates of four sizes, and with the minutes left a run on CIFAR-10 with its pictures.
#
#     bash tests/gpu.sh OUT              results go to OUT: log.txt, *.csv, *.png
#     bash tests/gpu.sh OUT --tiny       the same on the CPU in miniature, to see that the script works
#
# MIXMIX_DATA names the folder with data for tests (CONTRIBUTING.md); without it there is no run on CIFAR-10.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:?usage: gpu.sh OUT [--tiny]}"); mkdir -p "$OUT"
export OUT
DEVICE=cuda MODELS=DiT-S/4,DiT-B/2 BATCH=64 RATES="DiT-S/4:1024 DiT-S/2:256 DiT-B/2:128 DiT-XL/2:64" STEPS=200 SECONDS_LEFT=${SECONDS_LEFT:-150}
SAMPLED=DiT-XL/2 PHOTOS=DiT-S/2:256 EVERY=1000 IMAGES=80
if [ "${2:-}" = --tiny ]; then
  DEVICE=cpu MODELS=DiT-N/8 BATCH=2 RATES="DiT-N/8:4" STEPS=4 SECONDS_LEFT=10 SAMPLED=DiT-N/4 PHOTOS=DiT-N/8:4 EVERY=20 IMAGES=10
fi
part() { echo "== $1"; shift; timeout -k 10 "$@" 2>&1 | grep -v Warning; echo "   status ${PIPESTATUS[0]}"; } # SECONDS COMMAND…
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
{
python -c "import torch; print(torch.__version__, torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'no GPU')"

part 'tests that need a GPU' 120 python -m pytest -q -p no:xdist -o addopts= tests/test_gpu.py

part 'beside diffusers and a plain DiT' 150 python -m mixmix_nb.benchmark --device $DEVICE --model $MODELS --batch-size $BATCH --rounds 5 --out "$work/bench"
cp "$work"/bench/* "$OUT" 2>/dev/null

# training rates: from random latents of 256-pixel images, so from the cache that a real run would have
python - "$work/latents" <<'PY'
import sys, torch
from mixmix_nb.data import TensorData
from mixmix_nb.images import DataInfo
from mixmix_nb.latents import encode
from mixmix_nb.core import StepRandoms
class Noise: # an autoencoder of which only the shape counts
    name, channels, factor, has_posterior = 'none-such', 4, 8, False
    def latent_size(self, size): return size//8
    def moments(self, x): return torch.randn(len(x), 4, 32, 32), torch.zeros(len(x), 4, 32, 32)
    def fingerprint(self): return '0'*16
n = 2048 if torch.cuda.is_available() else 64
x = torch.zeros(n, 3, 256, 256, dtype=torch.uint8)
encode(TensorData(x, torch.arange(n)%1000, DataInfo('random', (3, 256, 256), [f'class {i}' for i in range(1000)])), Noise(), sys.argv[1], flip=False, batch=64)
PY
for rate in $RATES; do
  model=${rate%:*} batch=${rate#*:}
  for how in "--mixed-precision no" "--mixed-precision best" "--mixed-precision best --compile on"; do
    [ $DEVICE = cpu ] && [[ $how = *compile* ]] && continue
    echo "== training $model, batch $batch, $how"
    timeout -k 10 100 python -m mixmix_nb.train --data-path "$work/latents" --model $model --batch-size $batch $how --steps $STEPS \
      --log-every $((STEPS/4)) --num-sample-images 0 --ckpt-every 1000000 --device $DEVICE --results-dir "$work/rates" 2>&1 | grep images/s | tail -1
  done
done

part "sampling $SAMPLED" 90 python - "$DEVICE" "$SAMPLED" "$OUT/sampling.csv" <<'PY'
import csv, sys, torch
from mixmix_nb.benchmark import print_rows, sampling_rows
rows = sampling_rows(sys.argv[2], 8, torch.device(sys.argv[1]), steps=50 if sys.argv[1]=='cuda' else 2)
print_rows(rows)
with open(sys.argv[3], 'w', newline='') as f:
    w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)
PY

if [ -n "${MIXMIX_DATA:-}" ]; then
  tar xf "$MIXMIX_DATA/cifar10/train.tar.xz" -C "$work"
  part 'CIFAR-10' $((SECONDS_LEFT+30)) timeout -s TERM $SECONDS_LEFT python -m mixmix_nb.train --data-path "$work/train" --image-size 32 --model ${PHOTOS%:*} --objective flow \
    --time-sampling logit-normal --batch-size ${PHOTOS#*:} --lr 5e-4 --warmup 200 --ema-decay .999 --mixed-precision --num-sampling-steps 25 --sampler heun --cfg-scale 2 \
    --epochs 1000 --ckpt-every $EVERY --num-workers 8 --device $DEVICE --results-dir "$work/cifar" | tail -5
  python -m mixmix_nb.sample --ckpt "$work"/cifar/*/ --num-images $IMAGES --device $DEVICE --out "$OUT/cifar10.png" || true
  cp "$work"/cifar/*/metrics.csv "$OUT/cifar10.csv" 2>/dev/null
fi
echo "took $SECONDS s"
} 2>&1 | tee "$OUT/log.txt"
