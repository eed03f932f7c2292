#!/usr/bin/env bash
# A real SLURM cluster on one machine, for tests: a controller and a few nodes. Each node is a slurmd in its own network,
# host-name and mount namespaces. Needs root, and Debian's slurm-wlm, munge and iproute2. Changes no file of an installed SLURM.
#
#   cluster.sh up | down | install | kill NODE | hide NODE FOLDER | show NODE FOLDER
#
# up returns when all nodes answer; commands find the cluster by SLURM_CONF=$BASE/slurm.conf.
# kill ends a node with all its processes (`up` starts it again). hide makes a folder read-only on one node.
set -euo pipefail

BASE=${BASE:-/var/lib/pocl-slurm} NODES=${NODES:-n1 n2 n3} CPUS=${CPUS:-2}
NET=10.78.0 BRIDGE=pocl-slurm CONFIG=$BASE/slurm.conf
export SLURM_CONF=$CONFIG PATH=$PATH:/usr/sbin:/sbin

space() { echo "pocl-$1"; } # the network namespace of a node
running() { local pid; pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; }
wait_for() {
  local i
  for ((i = 0; i < 150; i++)); do "$@" >/dev/null 2>&1 && return 0; sleep 0.2; done
  echo "cluster.sh: timed out after 30 s waiting for: $*" >&2
  return 1
}

install_packages() {
  command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v ip >/dev/null && return
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y slurm-wlm munge iproute2 >/dev/null 2>&1 ||
    { apt-get update >/dev/null 2>&1 && apt-get install -y slurm-wlm munge iproute2 >/dev/null; }
}

write_config() {
  local node number=1
  mkdir -p "$BASE/state" "$BASE/log" "$BASE/pids"
  chown -R slurm: "$BASE/state" "$BASE/log" "$BASE/pids"
  cat >"$CONFIG" <<END
ClusterName=pocl-test
SlurmctldHost=$(hostname)($NET.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=slurm
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool-%n
SlurmctldPidFile=$BASE/pids/slurmctld.pid
SlurmdPidFile=$BASE/pids/slurmd-%n.pid
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=3600
KillWait=5
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
END
  for node in $NODES; do
    echo "NodeName=$node NodeAddr=$NET.$((10 + number)) CPUs=$CPUS RealMemory=8000 State=UNKNOWN" >>"$CONFIG"
    echo "$NET.$((10 + number)) $node"
    number=$((number + 1))
  done >"$BASE/hosts"
  printf '127.0.0.1 localhost\n%s.1 %s\n' "$NET" "$(hostname)" >>"$BASE/hosts"
  cat >>"$CONFIG" <<END
PartitionName=main Nodes=${NODES// /,} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=abrupt Nodes=${NODES// /,} MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=${NODES// /,} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
}

start_munge() {
  mkdir -p /run/munge /var/log/munge /var/lib/munge
  chown munge: /run/munge /var/log/munge /var/lib/munge
  chmod 0755 /run/munge
  if [ ! -s /etc/munge/munge.key ]; then
    (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
    chown munge: /etc/munge/munge.key
  fi
  if ! munge -n </dev/null 2>/dev/null | unmunge >/dev/null 2>&1; then
    runuser -u munge -- /usr/sbin/munged
    touch "$BASE/started-munge"
  fi
  wait_for sh -c 'munge -n </dev/null | unmunge'
}

start_network() {
  local node number=1
  ip link show "$BRIDGE" >/dev/null 2>&1 || { ip link add "$BRIDGE" type bridge && ip addr add "$NET.1/24" dev "$BRIDGE"; }
  ip link set "$BRIDGE" up
  for node in $NODES; do
    if ! ip netns list | grep -qw "$(space "$node")"; then
      ip netns add "$(space "$node")"
      ip link del "pocl-$node" 2>/dev/null || true # the kernel removes links of deleted namespaces with a delay
      ip link add "pocl-$node" type veth peer name eth0 netns "$(space "$node")"
      ip link set "pocl-$node" master "$BRIDGE"
      ip link set "pocl-$node" up
      ip -n "$(space "$node")" addr add "$NET.$((10 + number))/24" dev eth0
      ip -n "$(space "$node")" link set eth0 up
      ip -n "$(space "$node")" link set lo up
    fi
    number=$((number + 1))
  done
}

start_node() {
  running "$BASE/pids/slurmd-$1.pid" && return
  mkdir -p "$BASE/spool-$1"
  # nsenter, not `ip netns exec`, which mounts a new /sys without the cgroups that slurmd needs.
  # shellcheck disable=SC2016
  nsenter --net="/run/netns/$(space "$1")" unshare --uts --mount sh -c \
    'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec slurmd -N "$1" -f "$2/slurm.conf"' sh "$1" "$BASE"
}

up() {
  local node
  running "$BASE/pids/slurmctld.pid" || write_config
  start_munge
  start_network
  # A small disk for all nodes. It must exist first, since a node keeps the mounts of the moment in which it starts.
  if ! mountpoint -q "$BASE/small"; then mkdir -p "$BASE/small" && mount -t tmpfs -o size=24m,mode=1777 none "$BASE/small"; fi
  running "$BASE/pids/slurmctld.pid" || slurmctld -f "$CONFIG"
  wait_for scontrol ping
  for node in $NODES; do start_node "$node"; done
  for node in $NODES; do
    wait_for sh -c "sinfo -h -N -n $node -o %t | grep -qE '^(idle|mix|alloc|comp|drain|drng)$'" ||
      scontrol update nodename="$node" state=resume
  done
}

# Everything in a node's network namespace: slurmd, the steps' daemons, and the tasks.
kill_node() {
  ip netns pids "$(space "$1")" | xargs -r kill -9
  rm -f "$BASE/pids/slurmd-$1.pid"
}

down() {
  local node
  for node in $NODES; do
    ip netns list 2>/dev/null | grep -qw "$(space "$node")" || continue
    kill_node "$node"
    ip netns del "$(space "$node")"
  done
  if running "$BASE/pids/slurmctld.pid"; then
    kill "$(cat "$BASE/pids/slurmctld.pid")"
    wait_for sh -c "! kill -0 $(cat "$BASE/pids/slurmctld.pid")"
  fi
  if [ -e "$BASE/started-munge" ]; then kill "$(cat /run/munge/munged.pid)"; fi
  ip link del "$BRIDGE" 2>/dev/null || true
  if mountpoint -q "$BASE/small"; then umount -l "$BASE/small"; fi
  rm -rf "$BASE"
}

in_node() { nsenter --mount --target "$(cat "$BASE/pids/slurmd-$1.pid")" "${@:2}"; }

case ${1:-} in
  install) install_packages ;;
  up) up ;;
  down) down ;;
  kill) kill_node "$2" ;;
  hide) in_node "$2" mount --bind "$3" "$3" && in_node "$2" mount -o remount,ro,bind "$3" ;;
  show) in_node "$2" umount "$3" ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
