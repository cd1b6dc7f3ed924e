#!/usr/bin/env bash
# A stand-in of Qwen3-30B-A3B, edited on one GPU: seconds, peaks beside their plans, waits and a profile, as JSON.
# Options are those of benchmarks/gpu.py; without a GPU: benchmarks/gpu.sh --device cpu --scale 16 --layers 4 --edits 4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
