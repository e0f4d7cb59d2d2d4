# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with mmalign and the given extras.
# A stamp beside it makes the second run a matter of milliseconds.

setup_environment() { # extras, e.g. cpu,offline
  local extras="$1" stamp python
  for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
    if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then break; fi
    python=""
  done
  if [ -z "$python" ]; then
    echo "error: no Python 3.10 or newer was found; install one, or set PYTHON=/path/to/python3" >&2
    return 1
  fi
  VENV="${MMALIGN_VENV:-$PWD/.venv}"
  if ! "$VENV/bin/python" -c '' 2>/dev/null; then
    echo "making a virtual environment in $VENV"
    if ! "$python" -m venv "$VENV" && ! "$python" -m virtualenv "$VENV"; then
      rm -rf "$VENV"
      echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
      return 1
    fi
  fi
  stamp="$(cksum < pyproject.toml) $PWD"
  if ! { [ -f "$VENV/mmalign-$extras" ] && [ "$(cat "$VENV/mmalign-$extras")" = "$stamp" ]; }; then
    echo "installing mmalign[$extras] (several GB with torch; a few minutes)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip || return 1
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]" || return 1
    echo "$stamp" > "$VENV/mmalign-$extras"
  fi
}
