#!/usr/bin/env bash
# A SLURM cluster of two nodes on this one machine, for as long as this script runs:
#   tests/slurm_up.sh DIR       says `up: export SLURM_CONF=DIR/slurm.conf` when it can be used,
#                               and takes all down at the end of its input (Ctrl-D), at Ctrl-C or SIGTERM
# Needs slurmctld, slurmd and munged (Debian: slurm-wlm, munge), no systemd, no cgroups, no root. All is in DIR.
# Each node calls itself owner of all cores: two jobs share them as two processes do.
set -euo pipefail

dir=${1:?usage: slurm_up.sh DIR}
mkdir -p "$dir"/{state,log,node1,node2}
dir=$(cd "$dir" && pwd)
chmod 755 "$dir"
export SLURM_CONF=$dir/slurm.conf
pids=()

down() {
  trap - EXIT
  scancel --full --user "$(id -un)" 2>/dev/null && sleep 1
  for ((i=${#pids[@]}-1; i>=0; i--)); do kill "${pids[i]}" 2>/dev/null || true; done
  for p in "${pids[@]}"; do
    for _ in {1..50}; do kill -0 "$p" 2>/dev/null || break; sleep .1; done
    kill -9 "$p" 2>/dev/null || true
  done
}
trap down EXIT
trap 'exit 0' INT TERM HUP

daemon() { local name=$1; shift; setsid "$@" >"$dir/log/$name.out" 2>&1 </dev/null & pids+=($!); }
until_() { for _ in {1..100}; do if "$@" >/dev/null 2>&1; then return; fi; sleep .1; done; echo "gave up waiting for: $*" >&2; tail -n 5 "$dir"/log/* >&2; exit 1; }
free_ports() { python3 -c '
import socket
s = [socket.socket() for _ in range(3)]
for x in s: x.bind(("127.0.0.1", 0))
print(*(x.getsockname()[1] for x in s))'; }

# who is who: one key for all
(umask 077; head -c 128 /dev/urandom > "$dir/munge.key")
daemon munged munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
  --pid-file="$dir/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed"
until_ test -S "$dir/munge.socket"

read -r port port1 port2 < <(free_ports)
host=$(hostname -s) user=$(id -un) cpus=$(nproc)
cat > "$SLURM_CONF" <<CONF
ClusterName=two
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
# a requeued job waits until the credential of its last start has run out: seconds, not two minutes
AuthInfo=socket=$dir/munge.socket,cred_expire=5
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
ReturnToService=2
KillWait=10
MinJobAge=600
MailProg=/bin/true
SlurmdParameters=config_overrides
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdPidFile=$dir/%n.pid
SlurmdLogFile=$dir/log/%n.log
SlurmdSpoolDir=$dir/%n
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$port1 CPUs=$cpus
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$port2 CPUs=$cpus
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
CONF

daemon slurmctld slurmctld -D -i
until_ scontrol ping
for n in node1 node2; do daemon "$n" slurmd -D -N "$n"; done
idle() { [ "$(sinfo --noheader --Node --format=%T | grep -c '^idle$')" = 2 ]; }
until_ idle
echo "up: export SLURM_CONF=$SLURM_CONF"
while read -r _; do :; done
