# shellcheck shell=bash
# Sourced by the other launch scripts: finds Python, makes the virtual environment, installs the package into it.
# Sets ROOT (the repository), VENV (default ROOT/.venv; set it beforehand to use another) and PYTHON (VENV's).

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
VENV=${VENV:-$ROOT/.venv}
PYTHON=$VENV/bin/python

version_fits() {  # A version manager may leave a python3.12 on the path that only prints an error: run it.
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

make_venv() {
  local candidate without_venv=""
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    version_fits "$candidate" || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      "$candidate" -m venv "$VENV" || fail "$candidate -m venv $VENV failed: see the lines above"
      return
    fi
    without_venv=${without_venv:-$candidate}
  done
  [[ -z $without_venv ]] || fail "$without_venv has no venv module: on Debian or Ubuntu, apt install python3-venv"
  fail "Python 3.11, 3.12 or 3.13 is needed; python3 here is: $(python3 --version 2>/dev/null || echo missing)"
}

# install_package [EXTRA]: the pinned requirements and this checkout, editable; nothing when already up to date.
install_package() {
  local extra=${1:-} stamp wanted
  "$PYTHON" -m pip --version >/dev/null 2>&1 || make_venv
  version_fits "$PYTHON" || fail "$VENV holds $("$PYTHON" --version 2>&1), not Python 3.11 to 3.13: set VENV to another folder"
  stamp=$VENV/terdit-jax${extra:+-$extra}.stamp
  wanted="$ROOT $(cat "$ROOT/requirements.txt" "$ROOT/pyproject.toml" | cksum)"
  [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]] || return 0
  echo "installing terdit-jax into $VENV (about a minute)"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check \
    --requirement "$ROOT/requirements.txt" --editable "$ROOT${extra:+[$extra]}" || fail "pip could not install: see the lines above"
  echo "$wanted" >"$stamp"
}
