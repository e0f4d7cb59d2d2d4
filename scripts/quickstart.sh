#!/usr/bin/env bash
# bash scripts/quickstart.sh [FOLDER]
# Installs into .venv, indexes FOLDER (or the sample photos) with the encoder that needs no network, runs a few
# searches and leaves a picture of the results in quickstart/.
set -euo pipefail
if [ "${1:-}" = "-h" ] || [ "${1:-}" = "--help" ]; then
  sed -n '2,4s/^# //p' "$0"
  exit 0
fi
folder=""
if [ $# -gt 0 ]; then
  if [ ! -d "$1" ]; then
    echo "error: '$1' is not a folder; give a folder of images, or nothing for the sample photos" >&2
    exit 1
  fi
  folder="$(cd -- "$1" && pwd)"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
setup_environment cpu,offline
export HF_HUB_OFFLINE=1
exec "$VENV/bin/python" scripts/quickstart.py ${folder:+"$folder"}
