#!/usr/bin/env bash
# Run the GPU tests and the benchmarks of the loss and the optimizer step on one GPU, one table each. Written to fit in 8 minutes
# on an H100, not yet measured there. Without a GPU it runs small shapes on the CPU, as a check of the script.
#
#   launch/bench_gpu.sh [WHEEL_DIR]
#
# PYTHON names the interpreter (default: .venv's, then python3); it needs torch and transformers. WHEEL_DIR is a folder with wheels
# of the packages that it lacks (deepspeed, datasets, rouge-score, ...); they are installed offline into a temporary folder.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
python=${PYTHON:-$here/.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=$(command -v python3)
export PYTHONPATH=$here PYTHONWARNINGS=ignore POCL_PYTHON=$python DS_BUILD_OPS=0 HF_HUB_OFFLINE=1
if [ -n "${1:-}" ]; then
  packages=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --target "$packages" "$1"/*.whl
  export PYTHONPATH=$here:$packages
fi
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  loss_shape=() step_sizes=(A B)
else
  echo "launch/bench_gpu.sh: no GPU is visible; running small shapes on the CPU"
  loss_shape=(512 4000 64) step_sizes=(tiny)
fi
"$python" -m pytest -q -p no:cacheprovider tests/gpu
"$python" -m pocl_ds.cli.main bench loss "${loss_shape[@]}"
"$python" -m pocl_ds.cli.main bench step "${step_sizes[@]}"
