#!/usr/bin/env bash
# Everything about one GPU, from a checkout on a machine with torch, in eight minutes and without a network:
#   bash benchmarks/gpu_check.sh [DIR]      $OUT if it is set, else runs/gpu_check; call it again and it goes on
# What comes back: gpu_check.json, .md, .png, and every stage's notes and log in one archive.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-${OUT:-runs/gpu_check}}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv || echo "no nvidia-smi"
python3 -c "import torch; print(torch.__version__, torch.version.cuda)"
for package in triton transformers datasets pytest matplotlib bitsandbytes torchao pytorch_optimizer; do
    python3 -c "import importlib.metadata as m; print('$package', m.version('$package'))" 2>/dev/null || echo "$package is missing"
done
work=$(mktemp -d)/check
[ -d "$folder/check" ] && cp -r "$folder/check" "$work"
timeout -s INT 540 python3 -m hf_shampoo4 bench --gpu-check "$work" "${@:2}"
code=$?
mkdir -p "$folder"
cp "$work"/gpu_check.* "$folder/" 2>/dev/null
tar -czf "$folder/stages.tar.gz" -C "$work" .
exit $code
