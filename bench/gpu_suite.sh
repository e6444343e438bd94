#!/usr/bin/env bash
# Everything that needs a GPU, measured in under 9 minutes: bench/gpu_suite.sh OUT_DIR [--cpu] [--parts a,b] [...]
#
# Runs from a checkout: nothing is installed and nothing is downloaded. It takes $PYTHON, the checkout's .venv or python3,
# which must have PyTorch and what ubgen imports; cmake and nvcc build the kernels where they are there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTORCH_NVML_BASED_CUDA_CHECK=1  # asking for GPUs this way leaves the process free to fork
exec "$python" -m bench.gpu_suite "$@"
