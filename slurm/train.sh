#!/usr/bin/env bash
# Train as a SLURM job that goes on until it is done, however often it is interrupted.
#   sbatch slurm/train.sh                                         as the settings below say
#   sbatch slurm/train.sh --data-path my/images --steps 100000    options of `python -m mixmix_nb.train`
#   sbatch slurm/train.sh --resume old/checkpoints/final.pt --steps 200000       go on from a checkpoint, here in its own run
#   MODEL=DiT-B/4 EPOCHS=80 sbatch slurm/train.sh                 settings from the environment
#   sbatch --nodes=4 --gpus-per-node=8 --partition=… slurm/train.sh        options of sbatch
# Submit from the root of the repository, and read along with: tail -f logs/dit_<jobid>.out
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

own=${DATA_PATH+--data-path}${MODEL+--model}                    # settings that are not the defaults below

# Settings. What is left empty the trainer chooses; an option after the script's name wins.
DATA_PATH=${DATA_PATH-data/coco/imagefolder/train}
MODEL=${MODEL-DiT-S/4}
IMAGE_SIZE=${IMAGE_SIZE-}
NUM_CLASSES=${NUM_CLASSES-}                                     # counted from the folders
BATCH_SIZE=${BATCH_SIZE-}                                       # of each process
EPOCHS=${EPOCHS-}
STEPS=${STEPS-}                                                 # in place of epochs
LR=${LR-}
RESULTS_DIR=${RESULTS_DIR-}
NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}      # one process for each GPU
MAX_RESTARTS=${MAX_RESTARTS:-200}                               # a run that is stopped this often gets nowhere
TORCHRUN_ARGS=${TORCHRUN_ARGS-}                                 # more options of torchrun, e.g. --max-restarts=3

# SLURM sends USR1 to this script before the time is up, and TERM when it wants the nodes.
# The script then makes a file; all processes of the run look for it, finish the step and write a checkpoint.
mkdir -p logs
asked=
export MIXMIX_STOP_FILE=$PWD/logs/dit_$SLURM_JOB_ID.stop
rm -f "$MIXMIX_STOP_FILE"
stop() { asked=yes woken=yes; touch "$MIXMIX_STOP_FILE"; echo "SIG$1: asking the run to stop"; }
trap 'stop USR1' USR1
trap 'stop TERM' TERM
said=$(mktemp)
trap 'rm -f "$said" "$MIXMIX_STOP_FILE"' EXIT

# A controller that is busy for a moment is asked again.
scontrol() {
  local pause
  for pause in 2 5 15; do command scontrol "$@" && return; sleep "$pause"; done
  command scontrol "$@"
}

# shellcheck source=slurm/activate.sh
. slurm/activate.sh

# The options: those after the script's name, and the settings for which there is none.
given() { case " $options " in *" $1 "*|*" $1="*) return 0;; esac; return 1; }
add() { if [ -n "$2" ] && ! given "$1"; then train+=("$1" "$2"); fi; }
options="$*"
train=(-m mixmix_nb.train)
case " $options " in
  *" --resume auto "*|*" --resume=auto "*) ;;
  *" --resume "*|*" --resume="*)                                # a checkpoint brings its own, and the defaults are not for it
    case $own in *--data-path*) ;; *) DATA_PATH=;; esac
    case $own in *--model*) ;; *) MODEL=;; esac;;
esac
add --data-path "$DATA_PATH"
add --model "$MODEL"
add --image-size "$IMAGE_SIZE"
add --num-classes "$NUM_CLASSES"
given --global-batch-size || add --batch-size "$BATCH_SIZE"
given --epochs || add --steps "$STEPS"
given --steps || [ -n "$STEPS" ] || add --epochs "$EPOCHS"
add --lr "$LR"
add --results-dir "$RESULTS_DIR"
train+=("$@")
# The first start may go on from any checkpoint, with --resume FILE, and its run may be in any folder: the log of this job
# names it. Later starts go on with that run; where it has no checkpoint yet, they begin with FILE as the first did.
if ! given --resume; then train+=(--resume auto)
elif [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
  log=${log:-logs/dit_$SLURM_JOB_ID.out}
  mine=$(sed -nE 's/^(.+): [^ ]+, [0-9,]+ parameters, .*/\1/p' "$log" | tail -n 1)
  if ls "$mine"/checkpoints/*.pt >/dev/null 2>&1; then train+=(--resume auto --results-dir "$(dirname "$mine")")
  else echo "$log names no run of this job that has a checkpoint: beginning as the first start did" >&2; fi
fi

# One process needs nobody. Several on a node have a torchrun, and the torchruns of all nodes meet at the first node.
nodes=${SLURM_JOB_NUM_NODES:-1} cpus=${SLURM_CPUS_PER_TASK:-1}
threads=$((cpus/NPROC_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export SRUN_CPUS_PER_TASK=$cpus PYTHONUNBUFFERED=1
command=(python "${train[@]}")
several=
if [ $((nodes*NPROC_PER_NODE)) -gt 1 ]; then
  several=yes
  meet=${MASTER_ADDR:-$(command scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}:${MASTER_PORT:-$((20000+SLURM_JOB_ID%10000))}
  agent=(--nnodes="$nodes" --nproc-per-node="$NPROC_PER_NODE" --rdzv-backend=c10d --rdzv-endpoint="$meet"
         --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}")
  # signals that reach torchrun itself: pass them on, and leave time for a checkpoint
  # (read from its file: `torchrun --help` imports torch, which takes seconds at each start)
  can=$(python -c 'import importlib.util as u; print(open(u.find_spec("torch").submodule_search_locations[0]+"/distributed/run.py").read())')
  case $can in *--signals-to-handle*) agent+=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1");; esac
  case $can in *--shutdown-timeout*) agent+=(--shutdown-timeout=100);; esac
  # shellcheck disable=SC2206 # words
  agent+=($TORCHRUN_ARGS)
  # shellcheck disable=SC2016 # each node tells by its own number whether it is the first
  command=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1
           bash -c 'exec torchrun --rdzv-conf=is_host=$((SLURM_NODEID==0)) "$@"' torchrun "${agent[@]}" "${train[@]}")
fi

# A copy of what it says is kept, to see how it ended. A signal interrupts `wait`, not the run: wait again.
exec 3> >(trap '' USR1 TERM INT; exec tee "$said"); tee=$!
"${command[@]}" >&3 2>&1 &
run=$!
exec 3>&-
while woken= && { wait "$run"; status=$?; [ -n "$woken" ]; }; do :; done
for _ in {1..100}; do kill -0 "$tee" 2>/dev/null || break; sleep .1; done

# Finished, or failed: the job ends with the run's status.
if ! grep -q 'stopped by .*go on with --resume auto' "$said"; then exit "$status"; fi
# (a torchrun that was signalled itself says 1 even then)
if [ "$status" != 0 ] && [ -z "$asked$several" ]; then exit "$status"; fi
# Stopped: the same job once more, unless somebody has cancelled it, or SLURM has put it back into the queue already.
if ! state=$(scontrol show job --oneliner "$SLURM_JOB_ID"); then
  echo "SLURM does not say whether this job may go on; if so, submit again with --resume and the newest checkpoint" >&2
  exit 1
fi
case $state in *JobState=RUNNING*|*Reason=TimeLimit*) ;; *) exit "$status";; esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
  echo "stopped for the $((MAX_RESTARTS+1))th time; to go on, submit again with --resume and the newest checkpoint" >&2
  exit 1
fi
trap '' USR1 TERM
if ! scontrol requeue "$SLURM_JOB_ID"; then
  echo "this job cannot be requeued; to go on, submit again with --resume and the newest checkpoint" >&2
  exit 1
fi
echo "requeued"
