#!/usr/bin/env bash
# Distil a small real model on this machine, from nothing to a report. Arguments go to `pocl run`:
#   launch/quickstart.sh --compare train.lr=1e-4
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
bash launch/setup.sh --quickstart
export PATH=$here/.venv/bin:$PATH
ranks=()
if [ "$(cat .venv/.pocl-stack)" = cuda ] && [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then
  echo "quickstart: one GPU is visible, which holds one rank: launch.ranks=1 in place of the recipe's 2"
  ranks=(launch.ranks=1)
fi
exec pocl run quickstart --run-dir runs/quickstart "${ranks[@]}" "$@"
