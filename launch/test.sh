#!/usr/bin/env bash
# Lint and the fast tests, in a virtual environment of their own making; arguments go to pytest (-m slow: the slow ones).
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_package dev
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -n 2 -m "not slow" "$@"
