#!/usr/bin/env bash
# Makes the environment and runs every check; arguments go to pytest: bash launch/test.sh tests/test_config.py -k lists
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
source "${VIRTUAL_ENV:-.venv}/bin/activate"

ruff check --quiet
ruff format --check --quiet
mypy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the tests' models are tiny: more threads take longer
exec python -m pytest "$@" </dev/null
