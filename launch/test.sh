#!/usr/bin/env bash
# Check everything: set-up, ruff, types, tests. Arguments go to pytest: launch/test.sh tests/unit -k rouge
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here" || exit 2
summary=() worst=0

# phase NAME COMMAND...: run, remember seconds and verdict; a failure does not hide what the next phase finds.
phase() {
  local name=$1 start=$SECONDS code=0
  shift
  echo "== $name"
  "$@" || code=$?
  summary+=("$(printf '%-8s %4d s  %s' "$name" "$((SECONDS - start))" "$([ "$code" = 0 ] && echo ok || echo "failed ($code)")")")
  if ((code && !worst)); then worst=$code; fi
  return "$code"
}

phase setup bash launch/setup.sh --dev --quickstart || exit "$worst"

export PATH=$here/.venv/bin:$PATH TORCH_EXTENSIONS_DIR=$here/.cache/torch_extensions
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

phase format ruff format --check .
phase ruff ruff check .
phase mypy mypy
# Two at a time: half of the suite waits, for SLURM, for signals, for processes to start. A file stays together with its fixtures.
# Without GPUs: the tests hold two ranks to the same bits, and one GPU has neither a second rank's place nor those bits.
phase pytest env DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

# Those marked gpu, one after another, where there are some; 5 says that none of them was asked for.
# shellcheck disable=SC2329 # phase calls it
on_gpus() {
  local code=0
  env -u DS_ACCELERATOR python -m pytest -n 0 -m gpu "$@" || code=$?
  return $((code == 5 ? 0 : code))
}
if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then phase gpu on_gpus "$@"; fi

echo "== summary"
printf '%s\n' "${summary[@]}"
exit "$worst"
