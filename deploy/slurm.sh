#!/usr/bin/env bash
# A verb of chartlm on the nodes of a Slurm allocation. From the root of this tree, on a file system that all nodes see:
#
#   ./launch.sh lint                                  # once, where pip reaches a registry: makes .venv
#   sbatch deploy/slurm.sh pretrain recipes/mimic3/awd_lstm.toml workers=16
#   sbatch --nodes=1 --gpus-per-node=0 deploy/slurm.sh shard recipes/mimic3/shard.toml input=/secure/NOTEEVENTS.csv.gz
#
# Two minutes before the time limit, and when Slurm preempts the job, the run saves and the job is queued again; it goes
# on where the run directory stands. `scancel JOB` ends it for good, `scancel --batch --signal=TERM JOB` saves first.
#SBATCH --job-name=chartlm
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --ntasks-per-node=1
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=chartlm-%j.log
# --exclusive: `ray symmetric-run` ends with `ray stop`, which ends every Ray process of yours on the node.
# --requeue: also when a node fails. EDIT what your site wants: partition, account, GPUs and CPUs of a node.
set -euo pipefail

RESTARTS=100       # of one job; a run that is told to stop as soon as it starts must not go round for ever
SAVED=75           # chartlm's Preempted: all is saved, start me again
LEAVES_SECONDS=60  # the other nodes miss the head after 30 s (below), and say that Ray failed

die() {
  printf 'chartlm: %s\n' "$1" >&2
  exit 2
}

root=${SLURM_SUBMIT_DIR:?run me by sbatch}
[[ -f $root/launch.sh ]] || die "$root: submit from the root of chartlm's tree"
[[ -x $root/.venv/bin/ray ]] || die "$root/.venv: is not there; ./launch.sh lint makes it"
(($# > 0)) || die "which verb? sbatch deploy/slurm.sh VERB RECIPE [key=value…]"
cd "$root"

# What the processes of this start share: a token (others on the network must not run code here), and what became of
# the verb. Slurm starts this script on the first node of the allocation, which is Ray's head.
start=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
shared=$root/runs/slurm-$start
nodes=${SLURM_JOB_NUM_NODES:-1}
mkdir -p "$root/runs"
rm -rf "$shared"
mkdir -m 700 "$shared"
trap 'rm -rf "$shared"' EXIT
(umask 077 && "$root/.venv/bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$shared/token")
head=127.0.0.1
((nodes == 1)) || head=${CHARTLM_HEAD_IP:-$(hostname -I | cut -d' ' -f1)} # of several networks: set CHARTLM_HEAD_IP
address=$head:$((20000 + SLURM_JOB_ID % 10000))
export shared nodes address
export PATH=$root/.venv/bin:$PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$shared/token RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds; a cold .venv on a network file system is slow
export RAY_gcs_rpc_server_reconnect_timeout_s=30
export RAY_TMPDIR=/tmp/chartlm-$start             # short: Ray's sockets lie in it

# On the head, when all nodes are there.
# shellcheck disable=SC2329 # symmetric-run calls it
run_verb() {
  RAY_ADDRESS=$address python -m cluster.cli "$@" &
  echo $! >"$shared/pid"
  local code=0
  wait $! || code=$?
  echo "$code" >"$shared/code"
  exit "$code"
}

# On every node. Slurm's TERM must not end Ray before the run has saved: the verb alone is told, by this script below.
# shellcheck disable=SC2329 # srun calls it
run_node() {
  trap : TERM
  # Where Slurm tracks processes by their parents, Ray outlives a start that was killed.
  [[ -z ${SLURM_RESTART_COUNT:-} ]] || ray stop --force >/dev/null
  mkdir -m 700 "$RAY_TMPDIR" || return
  ray symmetric-run --address "$address" --min-nodes "$nodes" --num-cpus "$SLURM_CPUS_ON_NODE" \
    --num-gpus "${SLURM_GPUS_ON_NODE:-0}" -- bash -c 'run_verb "$@"' run_verb "$@" 2>&1 |
    (trap '' TERM && grep --line-buffered -vE "$CHATTER")
  rm -rf "$RAY_TMPDIR"
}
export -f run_verb run_node
# What `ray stop` says of every process, and a raylet of itself when it ends.
export CHATTER=' scripts\.py:[0-9]+ -- |^\[state-dump\]|^\[[-0-9: ,]+ [IW] [0-9 ]+\] \(raylet\)'

told=
trap 'told=yes' TERM
srun --export=ALL --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
  bash -c 'run_node "$@"' run_node "$@" &
step=$!

passed_on=
while [[ ! -s $shared/code ]] && kill -0 "$step" 2>/dev/null; do
  if [[ -n $told && -z $passed_on && -s $shared/pid ]]; then
    kill -TERM "$(<"$shared/pid")" && passed_on=yes
    printf 'chartlm: told to stop; the run saves\n' >&2
  fi
  sleep 1 || true # TERM may end it
done
[[ -s $shared/code ]] || die "Ray did not start, or a node was lost; the lines above say why"
code=$(<"$shared/code")

for ((second = 0; second < LEAVES_SECONDS; second++)); do
  kill -0 "$step" 2>/dev/null || break
  sleep 1 || true
done

# 143: a verb that does not listen to TERM; its next start goes on as well.
if ((code == SAVED)) || [[ -n $told && $code == 143 ]]; then
  ((${SLURM_RESTART_COUNT:-0} < RESTARTS)) || die "queued again $RESTARTS times; start it by hand if that is meant"
  rm -rf "$shared" # Slurm may end this script before it comes to its own end
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
