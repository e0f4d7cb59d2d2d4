#!/usr/bin/env bash
# bash scripts/sdxl_mapo.sh [--smoke] [DATA] [OUTPUT]
# MaPO on SDXL from preference pairs to a LoRA, by scripts/sdxl_mapo.yaml (memory and time are stated there).
# DATA: whatever `mmalign train` takes; by default datasets:mapo-t2i/pick-style-cartoon, about 1,000 pairs.
# Human preferences at full size are datasets:yuvalkirstain/pickapic_v2: 959,040 rows, 335 GB to fetch.
# --smoke: the same on a tiny model and sample photographs with blurred ones as losers: under a minute on two cores.
# The same command goes on where a stopped run was. PRESET=24gb|48gb|80gb overrides the size read from the card;
# ACCELERATE_CONFIG=scripts/accelerate/multi_gpu.yaml trains on several.
set -euo pipefail
if [ "${1:-}" = "-h" ] || [ "${1:-}" = "--help" ]; then
  sed -n '2,9s/^# //p' "$0"
  exit 0
fi
smoke=""
if [ "${1:-}" = "--smoke" ]; then smoke=1 && shift; fi
if [ $# -gt 2 ]; then
  echo "error: '$3' is too much; usage: bash scripts/sdxl_mapo.sh [--smoke] [DATA] [OUTPUT]" >&2
  exit 2
fi
data="${1:-}"
output="${2:-}"
here="$PWD"
root="$(cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
. scripts/environment.sh
setup_environment train
PATH="$VENV/bin:$PATH"
cd "$here"

settings=(--config "$root/scripts/sdxl_mapo.yaml")
if [ "$smoke" ]; then
  # One thread: tensors this small gain nothing from a second, and lose much where another process wants its core.
  export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
  output="${output:-$root/runs/sdxl-mapo-smoke}"
  if [ -z "$data" ]; then
    data="$(dirname "$output")/photo-pairs"
    python "$root/scripts/photo_pairs.py" "$data"
  fi
  # SDXL's block layout, 64 px, and a learning rate that moves 60 steps visibly.
  settings+=(--model tiny:sdxl --resolution 64 --rank 8 --learning-rate 1e-3 --steps 60 --accumulation 1)
  settings+=(--probe-every 10 --checkpoint-every 30 --validate-every 30 --validation-steps 4)
else
  data="${data:-datasets:mapo-t2i/pick-style-cartoon}"
  output="${output:-$root/runs/sdxl-mapo}"
  if ! command -v nvidia-smi >/dev/null; then
    echo "error: no NVIDIA GPU was found; try the recipe with: bash scripts/sdxl_mapo.sh --smoke" >&2
    exit 1
  fi
  megabytes="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sort -n | head -1)"
  preset=24gb
  if [ "$megabytes" -ge 44000 ]; then preset=48gb; fi
  if [ "$megabytes" -ge 75000 ]; then preset=80gb; fi
  settings+=(--preset "${PRESET:-$preset}")
fi

train=(mmalign)
if [ "${ACCELERATE_CONFIG:-}" ]; then
  if [ ! -f "$ACCELERATE_CONFIG" ]; then
    echo "error: ACCELERATE_CONFIG is '$ACCELERATE_CONFIG', which is no file; see $root/scripts/accelerate" >&2
    exit 1
  fi
  train=(accelerate launch --config_file "$ACCELERATE_CONFIG" -m mmalign.cli)
fi
status=0
"${train[@]}" train mapo "$data" "$output" "${settings[@]}" || status=$?
if [ $status -ne 0 ] && [ $status -ne 4 ]; then exit $status; fi # 4: done, but some rows were left out

python "$root/scripts/compare_adapters.py" "$output"
cat <<EOF

$output
  samples/            the validation prompts before, during and after training
  comparison.png      the same prompts with both exported files, loaded anew
  metrics.jsonl       losses, margins and the probe, step by step
  export/             the LoRA: pytorch_lora_weights.safetensors for diffusers, the other for ComfyUI and kohya's tools
  config.yaml         every setting
EOF
