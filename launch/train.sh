#!/usr/bin/env bash
# Start the ranks of one pocl command. The only place that does.
#
#   launch/train.sh [--ranks N] [--threads T] [--module MODULE] COMMAND ARGUMENT...
#   launch/train.sh --ranks 2 train --run-dir runs/quickstart
#
# On one machine: N processes of MODULE COMMAND ARGUMENT... (MODULE is pocl_ds.cli.main unless told). Rank 0 writes to
# the terminal, every other rank to a log of its own in POCL_LOG_DIR, in the run directory's logs/, or in a temporary folder.
# When a rank fails, the others are ended (POCL_KILL_GRACE seconds after TERM comes KILL), the failed rank's last lines are
# shown, and its exit code is the script's. INT, TERM, USR1 and USR2 are passed on to every rank, once.
#
# In a task of `srun` the process becomes one rank itself: rendezvous comes from SLURM's variables. In an allocation of several
# nodes (`salloc`, or the script of a job) it calls `srun` for that.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${POCL_PYTHON:-$here/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  if [ -n "${POCL_PYTHON:-}" ]; then
    echo "launch/train.sh: POCL_PYTHON=$POCL_PYTHON is no program here: name an interpreter with the packages of pocl_ds" >&2
    exit 2
  fi
  python=python3
fi
python=$(command -v "$python")
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
  echo "launch/train.sh: give [--ranks N] [--threads T] and a command, as in: launch/train.sh --ranks 2 train --run-dir runs/x" >&2
  exit 2
fi

# A job that was promised GPUs must not become one without: what is wrong then is said where its nodes are looked at.
if [ -n "${POCL_GPUS:-}" ]; then
  unset DS_ACCELERATOR
elif ! nvidia-smi -L >/dev/null 2>&1 && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null; then # a container may lack nvidia-smi
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  # On CPUs ZeRO-3 allocates and frees gigabytes of gathered weights a step. glibc would map and unmap each, at a page fault
  # every 4 KiB (a quarter of the step); told so, it keeps and reuses them, for about 1 GiB more memory a rank.
  export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1} MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
fi
# In an installed wheel this folder lies within the package, which Python finds by itself.
if [ -d "$here/pocl_ds" ]; then export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}; fi
export PYTHONUNBUFFERED=1
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
PATH=$(dirname "$python"):$PATH
export PATH

# A task of an `srun` step is one rank. Not so the one task of an interactive step, the shell that `salloc` gives on some clusters,
# where ranks are asked for. The signal handlers come with Python: until then USR1 and USR2 do no harm.
tasks=${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}}
if [ -n "${SLURM_STEP_ID:-}" ] && [ -n "${SLURM_PROCID:-}" ] && { ((tasks > 1)) || ((${ranks:-1} == 1)); }; then
  if ((${ranks:-$tasks} != tasks)); then
    echo "launch/train.sh: --ranks $ranks in a step of $tasks tasks, each of which is one rank: leave --ranks out" >&2
    exit 2
  fi
  trap '' USR1 USR2
  export RANK=$SLURM_PROCID WORLD_SIZE=$tasks LOCAL_RANK=${SLURM_LOCALID:-0}
  export LOCAL_WORLD_SIZE=$((WORLD_SIZE / ${SLURM_STEP_NUM_NODES:-1}))
  # Of a node's GPUs each task may see its own alone (--gpus-per-task=1, --gpu-bind=single:1): the only one, whatever its number.
  # Where there are fewer GPUs than tasks, the one that all see is not theirs: a rank without one says so.
  if ((LOCAL_WORLD_SIZE > 1 && ${SLURM_GPUS_ON_NODE:-$LOCAL_WORLD_SIZE} >= LOCAL_WORLD_SIZE)) &&
    [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[^,]+$ ]]; then
    LOCAL_RANK=0
    if [ -n "${POCL_GPUS:-}" ]; then POCL_GPUS=1; fi
  fi
  if [ -z "${MASTER_ADDR:-}" ] && ! MASTER_ADDR=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)
  then
    echo "launch/train.sh: the first node is not known here without scontrol: export MASTER_ADDR" >&2
    exit 2
  fi
  export MASTER_ADDR
  if [ -n "${TMPDIR:-}" ]; then mkdir -p "$TMPDIR" 2>/dev/null || true; fi  # node-local: preflight tells where it cannot be
  # Below the ephemeral ports; jobs on one node, a job's steps, and its attempts each have their own.
  place=$((SLURM_JOB_ID * 16 + SLURM_STEP_ID + 5 * ${SLURM_RESTART_COUNT:-0}))
  export MASTER_PORT=${MASTER_PORT:-$((10000 + place % 22000))}
  export OMP_NUM_THREADS=${threads:-${SLURM_CPUS_PER_TASK:-1}}
  exec "$python" "$here/launch/pocl.py" "$module" "$@"
fi
# In an allocation, as in the script of a job or the shell of `salloc`, the ranks are spread over its nodes.
if [ -n "${SLURM_JOB_ID:-}" ] && ((${SLURM_NNODES:-1} > 1)); then
  cores=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} # a step does not take it over from its job by itself
  exec srun --ntasks="${ranks:-1}" ${cores:+"$cores"} --kill-on-bad-exit=1 bash "${BASH_SOURCE[0]}" ${threads:+--threads "$threads"} --module "$module" "$@"
fi

ranks=${ranks:-1}
cores=$(nproc)
threads=${threads:-$((cores / ranks > 0 ? cores / ranks : 1))}
logs=${POCL_LOG_DIR:-}
previous=''
for argument in "$@"; do
  if [ -z "$logs" ] && [ "$previous" = --run-dir ]; then logs=$argument/logs; fi
  previous=$argument
done
logs=${logs:-$(mktemp -d)}
mkdir -p "$logs"
exits=$(mktemp -d) # each rank's word on why it left
trap 'rm -rf "$exits"' EXIT
export POCL_EXITS=$exits

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1 MASTER_PORT=$port OMP_NUM_THREADS=$threads

declare -A alive=()
forward() {
  local pid
  for pid in "${alive[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
# Job control gives each rank a process group of its own: Ctrl-C at the terminal reaches this script only, and is forwarded
# exactly once. Without it a shell's background processes would ignore INT. What comes while they start is forwarded to all then.
set -m
asked=''
# shellcheck disable=SC2064
for name in INT TERM USR1 USR2; do trap "asked=$name" "$name"; done
for ((rank = 0; rank < ranks; rank++)); do
  if ((rank == 0)); then
    RANK=0 LOCAL_RANK=0 "$python" "$here/launch/pocl.py" "$module" "$@" &
  else
    RANK=$rank LOCAL_RANK=$rank "$python" "$here/launch/pocl.py" "$module" "$@" >"$logs/rank-$rank.log" 2>&1 &
  fi
  alive[$rank]=$!
done
# shellcheck disable=SC2064
for name in INT TERM USR1 USR2; do trap "forward $name" "$name"; done
if [ -n "$asked" ]; then forward "$asked"; fi

failed=0 first=0 ended=() grace=${POCL_KILL_GRACE:-30} terminate=0 kill_at=0
while ((${#alive[@]})); do
  for rank in "${!alive[@]}"; do
    pid=${alive[$rank]}
    kill -0 "$pid" 2>/dev/null && continue
    code=0
    wait "$pid" 2>/dev/null || code=$?
    unset "alive[$rank]"
    if ((rank == 0)); then first=$code; fi
    if ((code != 0 && (failed == 0 || terminate))); then ended+=("$rank:$code"); fi
    if ((code != 0 && failed == 0)); then
      failed=$code
      # Ranks that stop for the same reason get a moment to say so themselves.
      terminate=$((SECONDS + 3)) kill_at=$((SECONDS + 3 + grace))
    fi
  done
  if ((terminate && SECONDS >= terminate)); then forward TERM; terminate=0; fi
  if ((kill_at && SECONDS >= kill_at)); then forward KILL; kill_at=0; fi
  ((${#alive[@]} == 0)) && break
  sleep 0.2 &
  wait $! 2>/dev/null || true
done
if ((failed == 0)); then exit 0; fi
failed_rank=${ended[0]%%:*} said=''
if found=$("$python" "$here/launch/pocl.py" pocl_ds.runtime.first_failure "$exits" "${ended[@]}"); then
  read -r failed_rank failed <<<"$found"
  said=${found#*$'\n'} # none leaves the first line, which no log has
  if [ "$said" = "$found" ]; then said=''; fi
fi
# Where all ranks stop for one reason, rank 0 has said it; a code of 1 is a defect, and each rank's own.
if ((failed_rank && !(first == failed && failed != 1))); then
  log=$logs/rank-$failed_rank.log
  echo "launch/train.sh: rank $failed_rank failed first, with exit code $failed; the end of $log:" >&2
  tail -n 12 "$log" >&2
  if [ -n "$said" ] && ! grep -qF -- "$said" "$log"; then echo "$said" >&2; fi # the log lies on a full disk
fi
exit "$failed"
