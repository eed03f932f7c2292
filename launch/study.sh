#!/usr/bin/env bash
# Compare KD with POCL for three losses on this machine's CPU. First fine-tune the teacher, SmolLM2-135M, on the data, then run
# every cell of launch/studies/small.yaml. After an interruption the same command resumes.
#
#   launch/study.sh DATA BENCHMARK_DIR [field=value ...]
#
# DATA: a .jsonl file of instructions. BENCHMARK_DIR: a folder with dolly.jsonl, self_inst.jsonl, ... (docs/evaluation.md).
# The fields override those of the study. STUDY names the study (default: small), RUNS the output folder (default: runs/STUDY).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if (($# < 2)); then
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
data=$1 benchmark_dir=$2
shift 2
study=${STUDY:-small}
runs=${RUNS:-runs/$study}
python=${PYTHON:-}
if [ -z "$python" ]; then
  bash "$here/launch/setup.sh" --quickstart
  python=$here/.venv/bin/python
fi
pocl() { POCL_PYTHON=$python "$python" "$here/launch/pocl.py" pocl_ds.cli.main "$@"; }
read -r -a teacher_fields <<<"${TEACHER_FIELDS:-}"

pocl run smollm2-teacher --run-dir "$runs/teacher" "data.source=$data" "${teacher_fields[@]}"
pocl study "$study" --run-dir "$runs/cells" "data.source=$data" "evaluate.benchmark_dir=$benchmark_dir" \
  evaluate.benchmarks=test,dolly,self_inst,vicuna,sni evaluate.max_samples=60 evaluate.held_out_loss=false \
  "teacher.model=$runs/teacher/export" "student.model=$runs/teacher/export" "$@"
