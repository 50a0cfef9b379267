#!/usr/bin/env bash
# Runs the tests marked `gpu`, and those marked `amx` where the CPU has it, with this machine's own Python: installs
# nothing, builds the native library in place.
# usage: test_gpu.sh [PYTHON] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
shift || true

missing=$("$python" - <<'PYTHON'
import importlib.util

needed = ("torch", "transformers", "peft", "accelerate", "safetensors", "yaml", "pytest", "setuptools", "cmake", "ninja", "pybind11", "typer", "rich")
print(" ".join(name for name in needed if importlib.util.find_spec(name) is None))
PYTHON
)
if [[ -n $missing ]]; then
  echo "make test-gpu: skipped; $("$python" -V) lacks: $missing"
  exit 0
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "make test-gpu: skipped; torch $("$python" -c 'import torch; print(torch.__version__)') sees no CUDA device"
  exit 0
fi
"$python" setup.py --quiet build_ext --inplace
HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m pytest -m "gpu or amx" "$@"
