#!/usr/bin/env bash
# Makes the environment and runs the checks: lint, types, and every promise once (about six minutes on two cores).
#
#   bash launch/test.sh --all          all that needs nothing but CPUs (about half an hour)
#   bash launch/test.sh --cluster      the drills of minutes: hosts that die, cables that are cut, real ssh, Slurm and pods.
#                                      Needs root and Linux; what else is missing is said by the tests that are skipped for it.
#
# Other arguments go to pytest, after --all or --cluster or alone: bash launch/test.sh tests/unit/test_config.py -k lists
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
source "${VIRTUAL_ENV:-.venv}/bin/activate"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tests' models are tiny: more threads take longer

if [[ ${1:-} == --cluster ]]; then
  shift
  exec python -m pytest -m cluster -s --timeout 1500 "$@" </dev/null
fi
chosen=()
if [[ ${1:-} == --all ]]; then
  shift
  chosen=(-m "not cluster")
fi
ruff check --quiet
ruff format --check --quiet
mypy
if (($# == 0)); then
  # one more than cores, for many tests wait: for ranks to start, or for time to pass
  cores=$(getconf _NPROCESSORS_ONLN)
  set -- --numprocesses $((cores < 3 ? cores + 1 : 4)) --dist worksteal
fi
exec python -m pytest "${chosen[@]}" "$@" </dev/null
