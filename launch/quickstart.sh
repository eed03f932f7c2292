#!/usr/bin/env bash
# Distill a small real model on this machine, from a fresh checkout to the report. Arguments go to `pocl run`; a second call continues:
#   launch/quickstart.sh --baseline train.lr=1e-4
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
bash launch/setup.sh --quickstart
export PATH=$here/.venv/bin:$PATH
start=$SECONDS

echo "quickstart: distilling a SmolLM2-135M, fine-tuned on short stories, into 10 of its 30 layers, from easy to hard (runs/quickstart)"
pocl run quickstart --run-dir runs/quickstart "$@"

cat <<EOF

quickstart: done in $((SECONDS - start)) s. Continue with your own data or on SLURM (docs/quickstart.md):
  .venv/bin/pocl run quickstart --run-dir runs/mine data.source=my.jsonl prompt.max_length=512
  .venv/bin/pocl submit qwen2.5-7b-to-0.5b --profile my-cluster.yaml --run-dir /shared/runs/qwen
EOF
