#!/usr/bin/env bash
# From nothing but Python to a ternary diffusion transformer of 8x8 digits: trained, sampled and scored on the CPU.
# DATA_DIR, WORKDIR and VENV pick other places; arguments go to terdit_jax.main, e.g. --config.train.num_steps=200.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
DATA_DIR=${DATA_DIR:-$ROOT/data/digits}
WORKDIR=${WORKDIR:-$ROOT/runs/digits}

install_package
"$PYTHON" -m terdit_jax.prepare --source=digits --output="$DATA_DIR"
"$PYTHON" -m terdit_jax.main --config="$ROOT/configs/digits.py" --workdir="$WORKDIR" --config.data.dir="$DATA_DIR" "$@"
"$PYTHON" -m terdit_jax.sample --model="$WORKDIR" --labels=0,1,2,3,4,5,6,7,8,9 --num_samples=100 --output="$WORKDIR/grid.png"
"$PYTHON" -m terdit_jax.evaluate --workdir="$WORKDIR"
