#!/usr/bin/env bash
# Start the ranks of one pocl command. No other code starts ranks.
#
#   launch/train.sh [--ranks N] [--threads T] [--module MODULE] COMMAND ARGUMENT...
#   launch/train.sh --ranks 2 train --run-dir runs/quickstart
#
# On one machine the script starts N processes of MODULE COMMAND ARGUMENT... (default module: pocl_ds.cli.main). Rank 0 writes to
# the terminal; every other rank writes to its own log in POCL_LOG_DIR, in the run directory's logs/, or in a temporary folder.
# If a rank fails, the script stops the others (TERM, and KILL after POCL_KILL_GRACE seconds), prints the last lines of the failed
# rank and exits with that rank's code. It forwards INT, TERM, HUP, USR1 and USR2 to every rank exactly once.
#
# In a task of `srun` the process itself becomes one rank, with the rendezvous from SLURM's variables. In an allocation of several
# nodes (`salloc`, or a job script) the script calls `srun`, which starts one task a rank.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${POCL_PYTHON:-$here/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  if [ -n "${POCL_PYTHON:-}" ]; then
    echo "launch/train.sh: POCL_PYTHON=$POCL_PYTHON is not a program on this machine: name an interpreter with the packages of pocl_ds" >&2
    exit 2
  fi
  python=python3
fi
python=$(command -v "$python")
package=$here/pocl_ds
if [ ! -d "$package" ]; then package=$here; fi # in an installed wheel this folder is inside the package
ranks='' threads='' module=pocl_ds.cli.main
while (($#)); do
  case $1 in
    --ranks) ranks=${2:?--ranks needs a number}; shift 2 ;;
    --threads) threads=${2:?--threads needs a number}; shift 2 ;;
    --module) module=${2:?--module needs a name}; shift 2 ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) break ;;
  esac
done
if (($# == 0)) || ! [[ $ranks =~ ^([1-9][0-9]*)?$ && $threads =~ ^([1-9][0-9]*)?$ ]]; then
  echo "launch/train.sh: usage: [--ranks N] [--threads T] COMMAND ..., for example: launch/train.sh --ranks 2 train --run-dir runs/x" >&2
  exit 2
fi

# AMD GPUs count if torch is built for ROCm: a desktop's processor often has one that torch cannot use.
has_amd_gpu() {
  compgen -G '/dev/kfd' >/dev/null &&
    "$python" -c 'import sys; from importlib.metadata import version; sys.exit("rocm" not in version("torch"))' 2>/dev/null
}

# A job that requested GPUs must not fall back to the CPU: if its nodes have none, the preflight check reports that.
if [ -n "${POCL_GPUS:-}" ]; then
  unset DS_ACCELERATOR
# A container may have devices but no nvidia-smi.
elif ! nvidia-smi -L >/dev/null 2>&1 && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && ! has_amd_gpu; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  # On CPUs ZeRO-3 allocates and frees gigabytes of gathered weights in each optimizer step. By default glibc maps and unmaps them,
  # with a page fault every 4 KiB (a quarter of the step's time). With these settings it reuses the memory, at about 1 GiB more per rank.
  export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1} MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
fi
# Python finds an installed package without PYTHONPATH.
if [ "$package" != "$here" ]; then export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}; fi
export PYTHONUNBUFFERED=1
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
PATH=$(dirname "$python"):$PATH
export PATH

# A task of an `srun` step is one rank. The exception is the single task of an interactive step, the shell that `salloc` opens on some
# clusters, if --ranks asks for more. Python installs the signal handlers; until then the process ignores USR1 and USR2.
tasks=${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}}
if [ -n "${SLURM_STEP_ID:-}" ] && [ -n "${SLURM_PROCID:-}" ] && { ((tasks > 1)) || ((${ranks:-1} == 1)); }; then
  if ((${ranks:-$tasks} != tasks)); then
    echo "launch/train.sh: --ranks $ranks in a step of $tasks tasks, each of which is one rank: leave --ranks out" >&2
    exit 2
  fi
  trap '' USR1 USR2
  export RANK=$SLURM_PROCID WORLD_SIZE=$tasks LOCAL_RANK=${SLURM_LOCALID:-0}
  export LOCAL_WORLD_SIZE=$((WORLD_SIZE / ${SLURM_STEP_NUM_NODES:-1}))
  # With --gpus-per-task=1 or --gpu-bind=single:1 each task sees only its own GPU, which is then device 0. If the node has fewer GPUs
  # than tasks, all tasks see the same GPU and LOCAL_RANK stays, so that a rank without a GPU reports it.
  # SLURM may set the variables of CUDA and of ROCm to the same numbers, but those of CUDA and HIP count among the GPUs that ROCR leaves.
  if [ -n "${ROCR_VISIBLE_DEVICES:-}" ]; then
    if [ "${HIP_VISIBLE_DEVICES:-}" = "$ROCR_VISIBLE_DEVICES" ]; then unset HIP_VISIBLE_DEVICES; fi
    if [ "${CUDA_VISIBLE_DEVICES:-}" = "$ROCR_VISIBLE_DEVICES" ]; then unset CUDA_VISIBLE_DEVICES; fi
  fi
  visible=${HIP_VISIBLE_DEVICES:-${CUDA_VISIBLE_DEVICES:-${ROCR_VISIBLE_DEVICES:-}}}
  if ((LOCAL_WORLD_SIZE > 1 && ${SLURM_GPUS_ON_NODE:-$LOCAL_WORLD_SIZE} >= LOCAL_WORLD_SIZE)) && [[ $visible =~ ^[^,]+$ ]]; then
    LOCAL_RANK=0
    if [ -n "${POCL_GPUS:-}" ]; then POCL_GPUS=1; fi
  fi
  if [ -z "${MASTER_ADDR:-}" ] && ! MASTER_ADDR=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)
  then
    echo "launch/train.sh: cannot find the first node without scontrol: export MASTER_ADDR" >&2
    exit 2
  fi
  export MASTER_ADDR
  if [ -n "${TMPDIR:-}" ]; then mkdir -p "$TMPDIR" 2>/dev/null || true; fi  # node-local; the preflight check reports a failure
  # A port below the ephemeral range that differs between jobs on one node, steps of a job, and attempts after a requeue.
  port_offset=$((SLURM_JOB_ID * 16 + SLURM_STEP_ID + 5 * ${SLURM_RESTART_COUNT:-0}))
  export MASTER_PORT=${MASTER_PORT:-$((10000 + port_offset % 22000))}
  export OMP_NUM_THREADS=${threads:-${SLURM_CPUS_PER_TASK:-1}}
  exec "$python" "$here/launch/pocl.py" "$module" "$@"
fi
# In an allocation of several nodes (a job script or the shell of `salloc`) srun distributes the ranks over the nodes.
if [ -n "${SLURM_JOB_ID:-}" ] && ((${SLURM_NNODES:-1} > 1)); then
  cpus=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} # a step does not inherit this from its job
  exec srun --ntasks="${ranks:-1}" ${cpus:+"$cpus"} --kill-on-bad-exit=1 bash "${BASH_SOURCE[0]}" ${threads:+--threads "$threads"} --module "$module" "$@"
fi

# From here on: all ranks on this machine. Choose the threads per rank and the folder for logs.
ranks=${ranks:-1}
cores=$(nproc)
threads=${threads:-$((cores / ranks > 0 ? cores / ranks : 1))}
log_dir=${POCL_LOG_DIR:-}
previous=''
for argument in "$@"; do
  if [ -z "$log_dir" ] && [ "$previous" = --run-dir ]; then log_dir=$argument/logs; fi
  previous=$argument
done
log_dir=${log_dir:-$(mktemp -d)}
mkdir -p "$log_dir"
exit_records=$(mktemp -d) # each rank writes there why it exits
trap 'rm -rf "$exit_records"' EXIT
export POCL_EXITS=$exit_records

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1 MASTER_PORT=$port OMP_NUM_THREADS=$threads

# Ranks die with this script, also if it is killed and cannot end them.
start=("$python" -I -S "$package/runtime/parent_death.py" $$ "$python" "$here/launch/pocl.py" "$module")
declare -A running_pids=()
forward() {
  local pid
  for pid in "${running_pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
# Job control gives each rank its own process group, so Ctrl-C at the terminal reaches only this script, which forwards it exactly
# once. Without job control the shell's background processes would ignore INT. A signal that arrives while the ranks start is
# forwarded once all of them run.
set -m
pending_signal=''
# shellcheck disable=SC2064
for name in INT TERM HUP USR1 USR2; do trap "pending_signal=$name" "$name"; done
for ((rank = 0; rank < ranks; rank++)); do
  if ((rank == 0)); then
    RANK=0 LOCAL_RANK=0 "${start[@]}" "$@" &
  else
    RANK=$rank LOCAL_RANK=$rank "${start[@]}" "$@" >"$log_dir/rank-$rank.log" 2>&1 &
  fi
  running_pids[$rank]=$!
done
# shellcheck disable=SC2064
for name in INT TERM HUP USR1 USR2; do trap "forward $name" "$name"; done
if [ -n "$pending_signal" ]; then forward "$pending_signal"; fi

# Wait for all ranks. `failures` lists RANK:CODE:PID of those that failed before the script stopped the others.
exit_code=0 rank0_code=0 failures=() grace=${POCL_KILL_GRACE:-30} terminate_at=0 kill_at=0
while ((${#running_pids[@]})); do
  for rank in "${!running_pids[@]}"; do
    pid=${running_pids[$rank]}
    kill -0 "$pid" 2>/dev/null && continue
    code=0
    wait "$pid" 2>/dev/null || code=$?
    unset "running_pids[$rank]"
    if ((code)); then kill -s KILL -- "-$pid" 2>/dev/null || true; fi # the workers that a rank has left behind
    if ((rank == 0)); then rank0_code=$code; fi
    if ((code != 0 && (exit_code == 0 || terminate_at))); then failures+=("$rank:$code:$pid"); fi
    if ((code != 0 && exit_code == 0)); then
      exit_code=$code
      # Ranks that stop for the same reason get 3 seconds to report it themselves.
      terminate_at=$((SECONDS + 3)) kill_at=$((SECONDS + 3 + grace))
    fi
  done
  if ((terminate_at && SECONDS >= terminate_at)); then forward TERM; terminate_at=0; fi
  if ((kill_at && SECONDS >= kill_at)); then forward KILL; kill_at=0; fi
  ((${#running_pids[@]} == 0)) && break
  sleep 0.2 &
  wait $! 2>/dev/null || true
done
if ((exit_code == 0)); then exit 0; fi

# Find the rank that failed first. The order in which the script noticed the failures is the fallback.
failed_rank=${failures[0]%%:*} kind=exit reason=''
if report=$("$python" "$here/launch/pocl.py" pocl_ds.runtime.first_failure "$exit_records" "${failures[@]}"); then
  read -r failed_rank exit_code kind <<<"$report"
  reason=${report#*$'\n'}
  if [ "$reason" = "$report" ]; then reason=''; fi # the report has no second line
fi
if [ "$kind" = signal ]; then # the end of its log says nothing about it
  echo "launch/train.sh: $reason" >&2
# If all ranks stop for the same reason, rank 0 has already printed it. A code of 1 is a defect, which each rank reports for itself.
elif ((failed_rank && !(rank0_code == exit_code && exit_code != 1))); then
  log=$log_dir/rank-$failed_rank.log
  echo "launch/train.sh: rank $failed_rank failed first, with exit code $exit_code; the end of $log:" >&2
  tail -n 12 "$log" >&2
  if [ -n "$reason" ] && ! grep -qF -- "$reason" "$log"; then echo "$reason" >&2; fi # the log's disk may be full
fi
exit "$exit_code"
