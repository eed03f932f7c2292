#!/usr/bin/env bash
# KD beside POCL with three losses on this machine's CPU: first a teacher, SmolLM2-135M fine-tuned on the data, then every cell of
# launch/studies/small.yaml. The same command goes on where it stopped.
#
#   launch/study.sh DATA BENCHMARKS [field=value ...]
#
# DATA: a .jsonl file of instructions. BENCHMARKS: a folder with dolly.jsonl, self_inst.jsonl, ... (README, Evaluate).
# Fields are the study's. STUDY names another one (default: small), RUNS where everything goes (default: runs/small).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if (($# < 2)); then
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
data=$1 benchmarks=$2
shift 2
study=${STUDY:-small}
runs=${RUNS:-runs/$study}
python=${PYTHON:-}
if [ -z "$python" ]; then
  bash "$here/launch/setup.sh" --quickstart
  python=$here/.venv/bin/python
fi
pocl() { POCL_PYTHON=$python "$python" "$here/launch/pocl.py" pocl_ds.cli.main "$@"; }
read -r -a teacher <<<"${TEACHER_FIELDS:-}"

pocl run smollm2-teacher --run-dir "$runs/teacher" "data.source=$data" "${teacher[@]}"
pocl study "$study" --run-dir "$runs/cells" "data.source=$data" "evaluate.benchmark_folder=$benchmarks" \
  evaluate.benchmarks=test,dolly,self_inst,vicuna,sni evaluate.samples=60 evaluate.loss=false \
  "teacher.model=$runs/teacher/export" "student.model=$runs/teacher/export" "$@"
