#!/usr/bin/env bash
# Tests and benchmarks of the loss and the step on one GPU, a table each. Meant for at most 8 minutes on an H100, not measured
# there yet; on a machine without a GPU the same with small shapes, to see that it runs.
#
#   launch/bench_gpu.sh [WHEELS]
#
# PYTHON names the interpreter (else .venv's, else python3); it needs torch and transformers. WHEELS is a folder with what it
# lacks (deepspeed, datasets, rouge-score, rapidfuzz, pydantic, ...), installed without a network into a folder of its own.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
python=${PYTHON:-$here/.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=$(command -v python3)
export PYTHONPATH=$here PYTHONWARNINGS=ignore POCL_PYTHON=$python DS_BUILD_OPS=0 HF_HUB_OFFLINE=1
if [ -n "${1:-}" ]; then
  extra=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --target "$extra" "$1"/*.whl
  export PYTHONPATH=$here:$extra
fi
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  shapes=() step=(A B)
else
  echo "launch/bench_gpu.sh: no GPU is visible, small shapes on the CPU"
  shapes=(512 4000 64) step=(tiny)
fi
"$python" -m pytest -q -p no:cacheprovider tests/gpu
"$python" -m pocl_ds.cli.main bench loss "${shapes[@]}"
"$python" -m pocl_ds.cli.main bench step "${step[@]}"
