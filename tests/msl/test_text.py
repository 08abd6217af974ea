import os
import subprocess
import sys

import mlx.core as mx
import pytest
from planted import needs_simulator

from vllm_metal_tq import msl
from vllm_metal_tq.msl.text import Parameter, as_cpp, kernel_bodies, signature, without_comments

THREADS = dict(grid=(32, 1, 1), threadgroup=(32, 1, 1), verbose=True)


def call_of(source, dtype=mx.float32, **options):
    kernel = mx.fast.metal_kernel(
        name="small", input_names=["x"], output_names=["y"], source=source, **options
    )
    return lambda x: kernel(
        inputs=[x], output_shapes=[(32,)], output_dtypes=[dtype], template=[("T", dtype)], **THREADS
    )


COPY = "y[thread_position_in_grid.x] = T(x[0]);"


@needs_simulator
def test_generated_text_is_what_mlx_generates():
    text = msl.generated_text(call_of(COPY, header="// a header\n"), mx.zeros(8))
    assert "// a header" in text
    assert COPY in text
    found = signature(text)
    assert found.template_arguments == "<float>"
    assert found.buffers == ["x", "y"]
    assert found.parameters[0] == Parameter("const device float*", "x", "buffer(0)")
    assert found.parameters[2] == Parameter(
        "uint3", "thread_position_in_grid", "thread_position_in_grid"
    )


@needs_simulator
@pytest.mark.parametrize(("size", "space"), [(7, "constant"), (8, "device")])
def test_small_inputs_are_constant(size, space):
    text = msl.generated_text(call_of(COPY), mx.zeros(size))
    assert signature(text).parameters[0].type.split()[1] == space


@needs_simulator
def test_generated_text_leaves_standard_output_alone(capfd):
    os.write(1, b"before\n")
    msl.generated_text(call_of(COPY), mx.zeros(8))
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "before\nafter\n"


def test_no_kernel_is_an_error():
    with pytest.raises(msl.MetalError, match="found 0"):
        msl.generated_text(lambda x: x + 1, mx.zeros(8))


@needs_simulator
def test_two_kernels_are_an_error():
    twice = [call_of(COPY), call_of(COPY + ";")]
    with pytest.raises(msl.MetalError, match="found 2"):
        msl.generated_text(lambda x: [call(x)[0] for call in twice], mx.zeros(8))


def test_standard_output_returns_after_an_error(capfd):
    def fail(x):
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        msl.generated_text(fail, mx.zeros(8))
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"


def test_comments_and_strings_go_and_lines_stay():
    text = 'a // b\n/* c\nd */ e "f // g" h'
    assert without_comments(text) == "a     \n    \n     e          h"


def test_as_cpp_changes_declarations_of_threadgroup_variables_only():
    text = (
        "  threadgroup float s[4], t[2];\n"
        "threadgroup vec<float, 2> v;\n"
        "  threadgroup float* p = s;\n"
        "f(threadgroup float* q);"
    )
    assert as_cpp(text) == (
        "  MSL_THREADGROUP_VAR threadgroup float s[4], t[2];\n"
        "MSL_THREADGROUP_VAR threadgroup vec<float, 2> v;\n"
        "  threadgroup float* p = s;\n"
        "f(threadgroup float* q);"
    )


def test_as_cpp_drops_attributes_of_the_instantiation():
    text = 'template [[host_name("k")]] [[kernel]] decltype(k<4>) k<4>;'
    assert as_cpp(text) == "template decltype(k<4>) k<4>;"


def test_kernel_bodies():
    text = "void f() { g(); }\n[[kernel]] void k(uint t [[x]]) { if (t) { g(); } } void h() {}"
    bodies = kernel_bodies(text)
    assert [text[start:end] for start, end in bodies] == [" if (t) { g(); } }"]


@pytest.mark.parametrize("text", ["void f() {}", "[[kernel]] void k(uint t) {}", "kernel void k("])
def test_signature_of_what_is_no_kernel(text):
    with pytest.raises(msl.MetalError):
        signature(text)


def test_import_needs_neither_mlx_nor_clang():
    code = "import sys, vllm_metal_tq.msl.text; print('mlx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
