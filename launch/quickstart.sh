#!/usr/bin/env bash
# Distill a small real model on this machine, from a fresh checkout to the report. Arguments go to `pocl run`:
#   launch/quickstart.sh --baseline train.lr=1e-4
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
bash launch/setup.sh --quickstart
export PATH=$here/.venv/bin:$PATH
overrides=()
if [ "$(cat .venv/.pocl-stack)" = cuda ] && [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then
  echo "quickstart: one GPU is visible and a GPU runs one rank: setting launch.ranks=1 (the recipe has 2)"
  overrides=(launch.ranks=1)
fi
exec pocl run quickstart --run-dir runs/quickstart "${overrides[@]}" "$@"
