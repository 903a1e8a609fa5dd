#!/usr/bin/env bash
# Slurm: one Ray cluster for the time of one job. sbatch cluster/slurm.sh CONFIG [--set A.B=C ...], in the project's root.
# The project, its .venv (`make` once, on a login node), shards and run directory lie on storage that all nodes share.
# The first node is the head and carries the resource `teacher`: `--set teacher.resources.custom.teacher=1` brings the teacher here.
#SBATCH --job-name=krd
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
[ $# -ge 1 ] || { echo "usage: sbatch cluster/slurm.sh CONFIG [--set A.B=C ...]" >&2; exit 2; }
export PATH="$PWD/.venv/bin:$PATH" RAY_AUTH_MODE=token
ray get-auth-token --generate >/dev/null # once; ~/.ray/auth_token is the same file on every node

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on() { srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" "${@:2}"; }
head=${nodes[0]}
address=$(on "$head" python -c 'import ray.util; print(ray.util.get_node_ip_address())')
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may meet on a node of a cluster that ignores --exclusive
shape=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="/tmp/ray-$SLURM_JOB_ID" --block)

wait_for() { # this many nodes, five minutes
  for _ in $(seq 100); do
    [ "$(on "$head" ray status --address="$address:$port" 2>/dev/null | grep -c '^ *1 node_')" -lt "$1" ] || return 0
    sleep 3
  done
  echo "not $1 Ray node(s) after five minutes; the lines above say why" >&2
  exit 1
}

on "$head" ray start --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 \
  --resources='{"teacher": 1}' "${shape[@]}" &
wait_for 1
for node in "${nodes[@]:1}"; do
  on "$node" ray start --address="$address:$port" "${shape[@]}" &
done
wait_for "${#nodes[@]}"

# Slurm's SIGTERM comes two minutes before the time is up: krd checkpoints and says how to go on.
# Not through `on`: the signal must reach srun, which hands it on, and not a shell around it.
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" krd distill "$@" --set "ray.address=$address:$port" &
driver=$!
trap 'kill -TERM "$driver"' TERM
status=0
wait "$driver" || status=$?
[ "$status" -lt 128 ] || wait "$driver" || status=$?
exit "$status" # Slurm ends the nodes' processes with the job
