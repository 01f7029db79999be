#!/usr/bin/env bash
# Train as a SLURM job that continues until it is done, however often it is interrupted.
#   sbatch slurm/train.sh                                         with the settings below
#   sbatch slurm/train.sh --data-path my/images --steps 100000    options of `python -m mixmix_nb.train`
#   MODEL=DiT-B/4 EPOCHS=80 sbatch slurm/train.sh                 settings from the environment
#   sbatch --nodes=4 --gpus-per-node=8 --partition=… slurm/train.sh        options of sbatch
# Submit from the root of the repository, and follow with: tail -f logs/dit_<jobid>.out
#SBATCH --job-name=dit
#SBATCH --output=logs/dit_%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# Settings; empty ones are left to the trainer. Options after the script's name win over them.
given() { case " $options " in *" $1 "*|*" $1="*) return 0;; esac; return 1; }
add() { if [ -n "$2" ] && ! given "$1"; then train+=("$1" "$2"); fi; }
options="$*" train=()
given --resume || DATA_PATH=${DATA_PATH-data/coco/imagefolder/train}
given --resume || given --init-from || { MODEL=${MODEL-DiT-S/4}; train+=(--resume auto); }
add --data-path "${DATA_PATH-}"
add --model "${MODEL-}"
add --image-size "${IMAGE_SIZE-}"
add --num-classes "${NUM_CLASSES-}"                             # counted from the folders
given --global-batch-size || add --batch-size "${BATCH_SIZE-}"  # per process
given --epochs || add --steps "${STEPS-}"
given --steps || [ -n "${STEPS-}" ] || add --epochs "${EPOCHS-}"
add --lr "${LR-}"
add --results-dir "${RESULTS_DIR-}"
train+=("$@")
MAX_RESTARTS=${MAX_RESTARTS:-200}

# One process per GPU, started by srun. Each tells the trainer its rank in torchrun's variables.
# shellcheck source=slurm/activate.sh
. slurm/activate.sh
mkdir -p logs
per_node=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} nodes=${SLURM_JOB_NUM_NODES:-1} cpus=${SLURM_CPUS_PER_TASK:-1}
cpus=$((cpus/per_node > 0 ? cpus/per_node : 1))
export WORLD_SIZE=$((nodes*per_node)) OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus} PYTHONUNBUFFERED=1
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-$((20000+(SLURM_JOB_ID*7+${SLURM_RESTART_COUNT:-0})%10000))}
export MASTER_ADDR MASTER_PORT

# SLURM signals this script before the time is up (USR1) and when it wants the nodes (TERM);
# the trainer then finishes its step, writes a checkpoint and exits with status 75.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 TERM
# When one has ended, stopped or dead, the others have a minute to end by themselves.
# shellcheck disable=SC2016 # expanded in each task
srun --nodes="$nodes" --ntasks="$WORLD_SIZE" --ntasks-per-node="$per_node" --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait=60 \
  bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m mixmix_nb.train "$@"' train "${train[@]}" &
wait $!; status=$?
while kill -0 $! 2>/dev/null; do wait $!; status=$?; done       # a signal interrupts `wait`, not the run

[ "$status" = 75 ] || exit "$status"
# Stopped with a checkpoint: back into the queue, unless the job was cancelled.
case $(scontrol show job --oneliner "$SLURM_JOB_ID") in *JobState=RUNNING*|*Reason=TimeLimit*|*PREEMPTED*) ;; *) exit "$status";; esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
  echo "stopped $((MAX_RESTARTS+1)) times; submit again to continue with --resume and the run's folder" >&2
  exit "$status"
fi
trap '' USR1 TERM
scontrol requeue "$SLURM_JOB_ID" && echo requeued
