#!/usr/bin/env bash
# Launches cluster/on_prem.yaml for real on one machine: three hosts with a network and an sshd each, `ray up`, a teacher and
# a distillation as Ray jobs, `ray down`. Run it as root on Linux, in a checkout whose .venv `make` has set up.
# Needs iproute2, util-linux, procps, openssh-server, openssh-client and rsync.
#
# Everything happens in namespaces of its own (network, processes, mounts, hostname): `ray stop` sees only the hosts' processes,
# home folders, keys and the token lie in memory, and the kernel removes all of it when this script ends, however it ends.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
readonly SELF=$PWD/cluster/local_hosts.sh NUM_HOSTS=3 SUBNET=10.77.0 WORK=/run/krd SHARED=/run/krd/shared
VENV=$(readlink -f .venv)
readonly VENV

step() { printf '\n== %s\n' "$*"; }

outside() {
  case "$PWD $VENV" in /tmp/* | /run/* | *" /tmp/"* | *" /run/"*)
    echo "the checkout and its .venv may not lie in /tmp or /run: the hosts have their own" >&2
    exit 2 ;;
  esac
  for program in ip unshare /usr/sbin/sshd ssh ssh-keygen rsync "$VENV/bin/ray"; do
    command -v "$program" >/dev/null || { echo "$program is missing; see the head of $SELF" >&2; exit 2; }
  done
  unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc "$SELF" laptop &
  namespaces=$!
  trap 'kill -KILL "$namespaces" 2>/dev/null || true' EXIT
  trap 'exit 130' INT TERM
  wait "$namespaces"
}

# A root account with a home folder of its own: ssh and Ray ask /etc/passwd where it is.
own_home() {
  export HOME=$WORK/home/$1
  mkdir -p "$HOME/.ssh"
  awk -F: -v OFS=: -v home="$HOME" '$1 == "root" {$6 = home; $7 = "/bin/bash"} 1' /etc/passwd > "$WORK/passwd-$1"
  mount --bind "$WORK/passwd-$1" /etc/passwd
  hostname "$1"
}

host() {
  mount -t tmpfs tmpfs /tmp
  mount -t tmpfs tmpfs /dev/shm
  own_home "$1"
  cp "$WORK/home/laptop/.ssh/id_ed25519.pub" "$HOME/.ssh/authorized_keys"
  ssh-keygen -q -t ed25519 -N '' -f "$HOME/host_key"
  printf '%s\n' "HostKey $HOME/host_key" "AuthorizedKeysFile $HOME/.ssh/authorized_keys" 'PermitRootLogin prohibit-password' \
    'PasswordAuthentication no' 'UsePAM no' 'StrictModes no' 'PidFile none' > "$HOME/sshd_config"
  /usr/sbin/sshd -D -e -f "$HOME/sshd_config" 2>"$WORK/sshd-$1.log" &
  wait # the first process of the host: it stays, and takes in what others leave behind
}

network() {
  ip link set lo up
  ip link add krd type bridge
  ip addr add $SUBNET.1/24 dev krd
  ip link set krd up
  for i in $(seq $NUM_HOSTS); do
    ip netns add "host$i"
    ip link add "to-host$i" type veth peer name eth0 netns "host$i"
    ip link set "to-host$i" master krd up
    ip -n "host$i" addr add $SUBNET.1"$i"/24 dev eth0
    ip -n "host$i" link set lo up
    ip -n "host$i" link set eth0 up
    ip -n "host$i" route add default via $SUBNET.1
  done
}

# The addresses are filled in; instead of installing the lock again, each host takes this checkout's .venv.
fill_in() {
  "$VENV/bin/python" - <<PYTHON
import yaml
cluster = yaml.safe_load(open("cluster/on_prem.yaml"))
hosts = [f"$SUBNET.1{i + 1}" for i in range($NUM_HOSTS)]
cluster["provider"].update(head_ip=hosts[0], worker_ips=hosts[1:])
cluster["auth"].update(ssh_user="root", ssh_private_key="$HOME/.ssh/id_ed25519")
installs = [command for command in cluster["setup_commands"] if "krd-venv/bin/" in command]
assert len(installs) == 3, installs
kept = [command for command in cluster["setup_commands"] if command not in installs]
cluster["setup_commands"] = ["ln -sfn $VENV ~/krd-venv", *kept]
yaml.safe_dump(cluster, open("$WORK/cluster.yaml", "w"))
PYTHON
}

wait_for_nodes() {
  for _ in $(seq 90); do
    [ "$(ray list nodes --address http://127.0.0.1:8265 2>/dev/null | grep -c ALIVE)" != $NUM_HOSTS ] || return 0
    sleep 1
  done
  echo "not all of $NUM_HOSTS nodes came up; the autoscaler says:" >&2
  ray exec $WORK/cluster.yaml 'tail -n 60 /tmp/ray/session_latest/logs/monitor.*' >&2
  return 1
}

job() {
  step "ray job submit --working-dir . -- $*"
  ray job submit --address http://127.0.0.1:8265 --working-dir . -- "$@"
}

laptop() {
  mount -t tmpfs -o mode=755 tmpfs /run
  mount -t tmpfs tmpfs /tmp
  mkdir -p $SHARED /run/sshd
  own_home laptop
  export PATH=$VENV/bin:$PATH RAY_AUTH_MODE=token
  unset RAY_ADDRESS RAY_TMPDIR PYTHONPATH

  step "$NUM_HOSTS hosts, $SUBNET.11 and on"
  network
  ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/id_ed25519"
  for i in $(seq $NUM_HOSTS); do
    ip netns exec "host$i" unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc "$SELF" host "host$i" &
  done
  fill_in
  ray get-auth-token --generate >/dev/null

  step "ray up cluster/on_prem.yaml"
  ray up --yes --no-config-cache $WORK/cluster.yaml
  ray dashboard $WORK/cluster.yaml >"$WORK/tunnel.log" 2>&1 &
  wait_for_nodes
  ray list nodes --address http://127.0.0.1:8265

  job krd shards digits $SHARED/shards --imbalance-ratio 20 --n-max 120 --store raw --image-size 8
  job krd teacher krd_ray/demo/teacher.yaml --set data.dir=$SHARED/shards --set run_dir=$SHARED/teacher --set train.epochs=15
  job krd distill cluster/smoke.yaml --set data.dir=$SHARED/shards --set run_dir=$SHARED/students \
    --set teacher.weights=$SHARED/teacher/students/teacher/model.safetensors

  step "who ran where"
  "$VENV/bin/python" - <<'PYTHON'
from collections import Counter
from ray.util.state import list_actors, list_nodes
dashboard = "http://127.0.0.1:8265"
addresses = {node.node_id: node.node_ip for node in list_nodes(dashboard)}
ran = Counter((addresses.get(actor.node_id, "?"), actor.class_name) for actor in list_actors(dashboard, limit=1000))
for (address, name), times in sorted(ran.items()):
    print(f"{address}  {name}: {times}")
PYTHON

  step "ray down"
  ray down --yes $WORK/cluster.yaml
  for seconds in $(seq 0 120); do
    pgrep raylet >/dev/null || { echo "no raylet left on any host, $seconds s after ray down"; return 0; }
    sleep 1
  done
  echo "raylets are left on the hosts two minutes after ray down" >&2
  return 1
}

"${1:-outside}" "${@:2}"
