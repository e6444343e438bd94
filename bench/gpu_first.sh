#!/usr/bin/env bash
# What the first nine minutes on a GPU should settle: bench/gpu_first.sh OUT_DIR. One JSON object a line in OUT_DIR/results.jsonl,
# written as soon as it is known. Before, where there is no GPU but time: bench/gpu_first.sh OUT_DIR --prepare, and take OUT_DIR along.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" bench/gpu_first.py "$@"
