#!/usr/bin/env bash
# bash scripts/test.sh [PYTEST ARGUMENTS]
# Sets itself up in .venv, then: linter, formatter, type check, import contract, tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
setup_environment cpu,offline,heif,train,dev
# One thread: tiny models gain nothing from a second, and lose much where another process wants its core.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PATH="$VENV/bin:$PATH"
ruff check .
ruff format --check .
mypy
lint-imports
exec python -m pytest "$@"
