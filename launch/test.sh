#!/usr/bin/env bash
# Lint, types and the fast tests, in a virtual environment of their own; arguments go to pytest (-m slow: the slow ones).
# EXTRAS=dev,parity also installs PyTorch, without which the tests against it are skipped.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_package "${EXTRAS:-dev}"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -n 2 --dist worksteal -m "not slow" "$@"
