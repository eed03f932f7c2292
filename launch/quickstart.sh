#!/usr/bin/env bash
# Distil a small real model on this machine, from nothing to a report. Arguments go to `pocl run`:
#   launch/quickstart.sh --compare train.lr=1e-4
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
bash launch/setup.sh --quickstart
export PATH=$here/.venv/bin:$PATH
exec pocl run quickstart --run-dir runs/quickstart "$@"
