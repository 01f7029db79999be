#!/usr/bin/env bash
# Fetch MS-COCO and encode it, as a job that training can wait for:
#   job=$(sbatch --parsable slurm/prepare.sh)
#   sbatch --dependency=afterok:"$job" slurm/train.sh
#   COCO= DATA_PATH=my/images sbatch slurm/prepare.sh             only encode pictures of your own
#   LATENTS= sbatch slurm/prepare.sh                              only fetch COCO
#   sbatch slurm/prepare.sh coco --val-only                       options of `python -m mixmix_nb.coco`, and nothing else
#   sbatch slurm/prepare.sh latents --data-path my/images …       options of `python -m mixmix_nb.latents`, and nothing else
# What is done already is not done again: a job that was interrupted goes on.
#SBATCH --job-name=dit-data
#SBATCH --output=logs/data_%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue

# Settings. What is left empty is not done, or left to the command.
COCO=${COCO-data/coco}                                          # where COCO goes
DATA_PATH=${DATA_PATH-${COCO:+$COCO/imagefolder/train}}         # pictures to encode
LATENTS=${LATENTS-data/latents}                                 # where their latents go
VAE=${VAE-}                                                     # ema, mse, a name on the hub, a folder
IMAGE_SIZE=${IMAGE_SIZE-}

set -e -o pipefail
# shellcheck source=slurm/activate.sh
. slurm/activate.sh
export PYTHONUNBUFFERED=1

case ${1-} in
  coco|latents) what=$1; shift; exec python -m "mixmix_nb.$what" "$@";;
  ?*) echo "prepare.sh: coco or latents, then its options; got $1" >&2; exit 2;;
esac
if [ -n "$COCO" ]; then python -m mixmix_nb.coco --output-dir "$COCO"; fi
if [ -n "$LATENTS" ]; then
  options=(--data-path "$DATA_PATH" --out "$LATENTS" --num-workers "${SLURM_CPUS_PER_TASK:-4}")
  if [ -n "$VAE" ]; then options+=(--vae "$VAE"); fi
  if [ -n "$IMAGE_SIZE" ]; then options+=(--image-size "$IMAGE_SIZE"); fi
  python -m mixmix_nb.latents "${options[@]}"
fi
