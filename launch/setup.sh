#!/usr/bin/env bash
# Makes the Python environment of the project in .venv, or in the virtual environment that is active.
# Run it as often as you like: it does what is missing, repairs what was interrupted, and else ends at once.
#
#   HOURGLASS_PYTHON=python3.12   the interpreter for a new .venv (default: python3, or the newest of 3.11 to 3.13)
#   HOURGLASS_TORCH=cpu | cuda    the build of torch (default: cuda where there is an NVIDIA GPU, else cpu)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env=${VIRTUAL_ENV:-$root/.venv}
python=$env/bin/python
stamp=$env/hourglass-setup
log=$env/hourglass-setup.log
pins=$root/launch/constraints.txt
cuda_pins=$root/launch/constraints-cuda.txt
torch=$(grep '^torch==' "$pins")
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
  echo "launch/setup.sh: $*" >&2
  exit 2
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

has_gpu() { [[ -e /dev/nvidia0 ]] || nvidia-smi -L >/dev/null 2>&1; }

find_interpreter() {
  local name
  for name in ${HOURGLASS_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if fits "$name"; then
      interpreter=$name
      return
    fi
  done
  name=${HOURGLASS_PYTHON:-python3}
  fail "needs Python 3.11 to 3.13, but $name is $("$name" -V 2>/dev/null || echo "not there");" \
    "install one or name one: HOURGLASS_PYTHON=/path/to/python3.13 bash launch/setup.sh"
}

# What a finished set-up depends on: another Python, other pins or another place of the checkout mean doing it again.
fingerprint() { { "$python" -V && echo "$root" && cat "$root/pyproject.toml" "$pins" "$cuda_pins"; } 2>&1 | sha256sum; }

# A CUDA build also serves a machine without a GPU, such as the login node of a cluster.
finished() {
  local print build
  { read -r print _ && read -r build; } 2>/dev/null <"$stamp" || return 1
  [[ $print == "$(fingerprint | cut -d' ' -f1)" ]] && { [[ $build == "$want" ]] || [[ $build == cuda && -z ${HOURGLASS_TORCH:-} ]]; }
}

# attempt WHAT COMMAND...: one progress line; the command's own output goes to the log.
attempt() {
  local what=$1 begin=$SECONDS
  shift
  printf '%s ... ' "$what"
  if "$@" >"$log" 2>&1 </dev/null; then
    echo "$((SECONDS - begin)) s"
  else
    echo "failed"
    return 1
  fi
}

# step WHAT COMMAND...: an attempt that must succeed.
step() {
  attempt "$@" && return
  if grep -q 'No space left on device' "$log"; then
    fail "$1: the disk is full; make room on $(df -P "$env" | awk 'NR == 2 {print $6}'), in ${TMPDIR:-/tmp} or in pip's cache, and run this again"
  fi
  tail -n 15 "$log" >&2
  fail "$1 failed (all of its output: $log); run this again to go on"
}

check_room() {
  local need=3 folder free
  [[ $want == cuda ]] && need=12
  folder=$(dirname "$env")
  free=$(($(df -Pk "$folder" | awk 'NR == 2 {print $4}') / 1024 / 1024))
  ((free >= need)) || fail "the environment needs $need GB of disk, and $folder has $free GB free"
}

make_environment() {
  if [[ -n ${VIRTUAL_ENV:-} ]]; then
    fits "$python" || fail "needs Python 3.11 to 3.13, but the active environment $env has $("$python" -V)"
    return
  fi
  "$python" -m pip --version >/dev/null 2>&1 && grep -qF "$env" "$env/bin/activate" && return
  find_interpreter
  "$interpreter" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$interpreter cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
  mkdir -p "$env"
  log=$(mktemp) step "making $env with $("$interpreter" -V)" "$interpreter" -m venv --clear "$env"
}

# Forget packages whose installation was cut short (no list of files, or files of the list missing): pip installs them again.
forget_broken() {
  "$python" - <<'EOF'
import csv, pathlib, shutil, sysconfig

site = pathlib.Path(sysconfig.get_path("purelib"))
for info in site.glob("*.dist-info"):
    record = info / "RECORD"
    listed = csv.reader(record.read_text().splitlines()) if record.exists() else [["nothing listed"]]
    if not all(row[0].endswith(".pyc") or (site / row[0]).exists() for row in listed):
        print(f"repairing {info.name.removesuffix('.dist-info')}")
        shutil.rmtree(info)
EOF
}

pip() { "$python" -m pip install --quiet "$@"; }

# build_of offered | installed: which build of torch pip would install, or has installed: cpu, cuda or none.
build_of() {
  if [[ $1 == offered ]]; then
    pip --dry-run --ignore-installed --no-deps --report - "$torch" 2>>"$log"
  else
    "$python" -m pip inspect 2>>"$log"
  fi | "$python" -c '
import json, sys
report = json.load(sys.stdin)
needs = [" ".join(p["metadata"].get("requires_dist", [])) for p in report.get("install", report.get("installed")) if p["metadata"]["name"] == "torch"]
print("none" if not needs else "cuda" if "nvidia" in needs[0] else "cpu")'
}

uv_torch() {
  local backend=auto
  [[ $want == cpu ]] && backend=cpu
  pip -c "$pins" uv
  "$python" -m uv pip install --quiet --python "$python" --torch-backend="$backend" --reinstall-package torch -c "$pins" "$torch"
}

install_torch() {
  local offered installed
  : >"$log"
  installed=$(build_of installed)
  offered=$(build_of offered) || offered=unknown
  if [[ $installed != "$want" ]]; then
    [[ $installed == none ]] || step "removing the $installed build of torch" "$python" -m pip uninstall --yes torch
    if [[ $offered == "$want" ]] || ! attempt "installing $torch ($want)" uv_torch; then
      [[ $offered == "$want" ]] || echo "taking the build of torch that pip offers: $offered"
      step "installing $torch ($offered)" pip -c "$pins" -c "$cuda_pins" "$torch"
    fi
  fi
  if [[ $want == cuda ]] && has_gpu && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    attempt "installing $torch for this machine's driver" uv_torch || echo "torch does not see the GPU: is its driver too old?"
  fi
}

want=${HOURGLASS_TORCH:-$(has_gpu && echo cuda || echo cpu)}
[[ $want == cpu || $want == cuda ]] || fail "HOURGLASS_TORCH: expected cpu or cuda, given $want"
[[ -z ${VIRTUAL_ENV:-} || -x $python ]] || fail "VIRTUAL_ENV is $VIRTUAL_ENV, which is no virtual environment"
exec 9<"$root/launch" && flock 9
if finished; then
  echo "the environment is ready: $env"
  exit 0
fi

check_room
rm -f "$stamp"
make_environment
forget_broken
step "updating pip" pip --upgrade -c "$pins" pip setuptools
install_torch
step "installing hourglass_dist and what it needs" pip -c "$pins" --build-constraint "$pins" -e "${root}[test]"
{ fingerprint && echo "$want"; } >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "the environment is ready: $env"
