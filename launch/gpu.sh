#!/usr/bin/env bash
# Measure this package on one GPU, in at most 8 minutes: conformance, loss, attention, optimizer steps, a whole run, vLLM. Without a
# GPU, or with --dry-run, the same parts run tiny shapes on the CPU, as a check of the script.
#
#   launch/gpu.sh [--dry-run] [--parts NAME,...] [--output DIR] [WHEEL_DIR...]
#
# Results: DIR/results.json, and DIR/results.md, a page for docs/results/speed.md. DIR is $OUT, else runs/gpu. Each part has its own time
# limit and log; a fault in one leaves the others running. A second call runs the parts without a result; --parts runs the named ones
# again (`steps` names all that begin with it). PYTHON names the interpreter (default: .venv's, then python3); it needs torch and
# transformers. WHEEL_DIR is a folder with wheels of the packages that it lacks (deepspeed, datasets, rouge-score, liger-kernel, trl,
# ...), and with .zip files of unpacked packages; they are installed offline into a temporary folder.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=$(command -v python3)
arguments=() folders=()
while (($#)); do
  case $1 in
    --parts | --output) arguments+=("$1" "${2:?$1 needs a value}"); shift 2 ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) arguments+=("$1"); shift ;;
    *) folders+=("$1"); shift ;;
  esac
done
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

if ((${#folders[@]})); then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  for folder in "${folders[@]}"; do
    shopt -s nullglob
    wheels=("$folder"/*.whl) archives=("$folder"/*.zip)
    shopt -u nullglob
    if ((${#wheels[@]} + ${#archives[@]} == 0)); then
      echo "launch/gpu.sh: $folder holds no wheels: name the folder with the .whl files" >&2
      exit 2
    fi
    if ((${#wheels[@]})); then
      "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$packages" "${wheels[@]}"
    fi
    for archive in "${archives[@]}"; do "$python" -m zipfile -e "$archive" "$packages"; done
  done
  export PYTHONPATH=$PYTHONPATH:$packages
fi
"$python" -m pocl_ds.cli.main bench gpu "${arguments[@]}"
