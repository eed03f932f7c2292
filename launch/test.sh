#!/usr/bin/env bash
# Run all checks: set-up, format, lint, types, documentation, tests. Arguments go to pytest: launch/test.sh tests/unit -k rouge
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here" || exit 2
summary=() exit_code=0

# phase NAME COMMAND...: run a command and record its duration and result. After a failure the later phases still run.
phase() {
  local name=$1 start=$SECONDS code=0
  shift
  echo "== $name"
  "$@" || code=$?
  summary+=("$(printf '%-8s %4d s  %s' "$name" "$((SECONDS - start))" "$([ "$code" = 0 ] && echo ok || echo "failed ($code)")")")
  if ((code && !exit_code)); then exit_code=$code; fi
  return "$code"
}

phase setup bash launch/setup.sh --dev --quickstart || exit "$exit_code"

export PATH=$here/.venv/bin:$PATH TORCH_EXTENSIONS_DIR=$here/.cache/torch_extensions
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE # the tests start hundreds of processes, and each would compile this package again

phase format ruff format --check .
phase lint ruff check .
phase types mypy
phase docs mkdocs build --strict --quiet
# Two workers: half of the tests wait for SLURM, for signals or for processes to start. One worker runs a whole file, which shares
# its fixtures. GPUs are hidden: the tests compare two ranks bit by bit, and one GPU cannot hold the second rank.
phase tests env DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

# Run the tests marked gpu one after another. Exit code 5 of pytest means that the selection has no such test.
# shellcheck disable=SC2329 # called through phase
run_gpu_tests() {
  local code=0
  env -u DS_ACCELERATOR python -m pytest -n 0 -m gpu "$@" || code=$?
  return $((code == 5 ? 0 : code))
}
if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then phase gpu run_gpu_tests "$@"; fi

echo "== summary"
printf '%s\n' "${summary[@]}"
exit "$exit_code"
