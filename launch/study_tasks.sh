#!/usr/bin/env bash
# The study `tasks` on this machine's CPU: make models with random weights, train the teacher on 360,000 samples and the students on 64,000,
# measure in a pilot which difference the study can show, and run it; then a part of it on harder tasks. After an interruption the same
# command resumes, and a second shell with `pocl study tasks --run-dir runs/tasks/cells` runs other cells at the same time.
#
#   launch/study_tasks.sh [field=value ...]
#
# The fields override those of the studies.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
bash launch/setup.sh
export PATH=$here/.venv/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more threads slow models of this size down
runs=runs/tasks

if [ ! -d "$runs/models" ]; then
  python launch/pocl.py pocl_ds.study.scratch_models "$runs/models.partial"
  mv "$runs/models.partial" "$runs/models"
fi
pocl run tasks-teacher --run-dir "$runs/teacher"
for size in quarter tenth thirtieth; do
  pocl run tasks-teacher --run-dir "$runs/student-$size" student.model="$runs/models/student-$size" \
    data.max_train_samples=64000 curriculum.epochs_per_stage=1
done
pocl study tasks-pilot --run-dir "$runs/pilot" "$@"
pocl study tasks --run-dir "$runs/cells" "$@"
pocl study tasks-harder --run-dir "$runs/harder" "$@"
