"""The kernels' text is CUDA, too: nvcc compiles it where there is no NVIDIA GPU to run it.

The signature is made as MLX makes it: inputs, then outputs, then the template's constants.
"""

import shutil
import subprocess

import centres
import mlx.core as mx
import pytest
from kernels.reference import Case, Centring

from vllm_metal_tq.config import T2, T3, TurboQuantConfig
from vllm_metal_tq.kernels import launch as launches
from vllm_metal_tq.kernels.decode import decode
from vllm_metal_tq.kernels.encode import encode
from vllm_metal_tq.kernels.gather import gather
from vllm_metal_tq.layout import PageLayout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
]

TYPES = {
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.float32: "float",
    mx.uint8: "unsigned char",
    mx.uint32: "unsigned int",
    mx.int32: "int",
}


@pytest.fixture
def compiles(tmp_path):
    """An executor that compiles a launch and computes nothing."""

    def execute(launch):
        inputs = [f"const {TYPES[x.dtype]}* {name}" for name, x in launch.inputs.items()]
        outputs = [f"{TYPES[dtype]}* {name}" for name, (_, dtype) in launch.outputs.items()]
        constants = [
            f"using {name} = {TYPES[value]};"
            if isinstance(value, mx.Dtype)
            else f"constexpr int {name} = {value};"
            for name, value in launch.template.items()
        ]
        text = launches.header(launch.kernel, "cuda") + "\n".join(constants)
        text += f"\n__global__ void kernel({', '.join(inputs + outputs)}) {{\n"
        text += launches._source(f"{launch.kernel}.metal", "cuda") + "}\n"
        source = tmp_path / f"{launch.kernel}.cu"
        source.write_text(text)
        # The oldest that MLX runs on, but for the fragments of 16 x 8 that came with the next.
        arch = "-arch=sm_80" if launch.kernel == "decode_mma" else "-arch=sm_75"
        command = ["nvcc", "-std=c++17", arch, "-cubin", "-o", "/dev/null", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        return [mx.zeros(shape, dtype) for shape, dtype in launch.outputs.values()]

    return execute


@pytest.mark.parametrize("widths", [(4, 4), (3, 5), (T2, T3), (T3, 4)])
@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("centred", [False, True])
def test_encode(centred, head_dim, widths, compiles):
    x = mx.zeros((2, 5, head_dim), mx.bfloat16)
    centre = centres.random(2, head_dim) if centred else None
    page = PageLayout(TurboQuantConfig(*widths), head_dim)
    for many in (False, True):
        encode(x, x, page, compiles, centre=centre, many=many)


@pytest.mark.parametrize("variant", ["fma", "mma"])
@pytest.mark.parametrize("widths", [(4, 4), (3, 5), (T2, T3)])
@pytest.mark.parametrize("centring", [None, Centring()])
def test_decode(centring, widths, variant, compiles):
    Case([40], widths=widths, centring=centring).attended(decode, variant=variant, execute=compiles)


@pytest.mark.parametrize("widths", [(4, 4), (T2, T3)])
def test_gather(widths, compiles):
    case = Case([40], widths=widths)
    gather(case.pool.pages, case.block_table[0], 40, case.layout, execute=compiles)
