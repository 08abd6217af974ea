import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from planted import CLEAN, kernel, needs_simulator

from vllm_metal_tq import msl
from vllm_metal_tq.msl import compiler

pytestmark = needs_simulator
X, N = np.arange(64, dtype=np.float32), np.array([3], np.int32)


def run(text, x=X, groups=1, **options):
    return msl.run(
        text, [x, N], [((64 * groups,), np.float32)], (64 * groups, 1, 1), (64, 1, 1), **options
    )[0]


def clean_result(x=X):
    sums = np.repeat([x[32:].sum(), x[:32].sum()], 32)
    return sums + np.float32(2**0.5) + 3


# ---- Faults

FAULTS = {
    "missing threadgroup barrier": (
        "s[t] = x[t]; y[t] = s[63 - t];",
        "without a barrier|nothing has written",
    ),
    "simdgroup barrier across SIMD-groups": (
        "s[t] = x[t];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\ny[t] = s[63 - t];",
        "without a barrier|nothing has written",
    ),
    "barrier without the memory flag": (
        "s[t] = x[t];\nthreadgroup_barrier(mem_flags::mem_none);\ny[t] = s[63 - t];",
        "without a barrier|nothing has written",
    ),
    "write after read": (
        "s[t] = x[t];\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "float a = s[(t + 1) % 64];\n"
        "s[t] = a;\n"
        "y[t] = a;",
        "without a barrier",
    ),
    "write after read by the last thread": (
        "s[t] = x[t]; threadgroup_barrier(mem_flags::mem_threadgroup);"
        "y[t] = s[0]; if (t == 63) s[0] = 1;",
        "write after another thread's read without a barrier",
    ),
    "write after write": (
        "s[t & 31] = x[t]; y[t] = 0;",
        "write after another thread's write without a barrier",
    ),
    "simdgroup barrier between SIMD-groups that happen to run in order": (
        "if (t < 32) s[t] = x[t]; simdgroup_barrier(mem_flags::mem_threadgroup); y[t] = s[lane];",
        "read of another thread's write without a barrier; thread 32",
    ),
    "simdgroup barrier without the memory flag": (
        "s[t] = x[t]; simdgroup_barrier(mem_flags::mem_none); y[t] = s[t ^ 1];",
        "read of another thread's write without a barrier",
    ),
    "unwritten threadgroup memory": (
        "if (t < 32) s[t] = x[t];\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "y[t] = s[63 - t];",
        "nothing has written",
    ),
    "barrier in a branch": (
        "if (t < 40) threadgroup_barrier(mem_flags::mem_threadgroup);\ny[t] = 0;",
        "divergence",
    ),
    "shuffle in a branch": (
        "float a = 0;\nif (lane & 1) a = simd_shuffle_xor(x[t], ushort(2));\ny[t] = a;",
        "divergence",
    ),
    "different operations": (
        "float a; if (lane & 1) a = simd_sum(x[t]); else a = simd_max(x[t]); y[t] = a;",
        "divergence",
    ),
    "return before a barrier": (
        "if (t == 5) return;\nthreadgroup_barrier(mem_flags::mem_none);\ny[t] = 0;",
        "divergence",
    ),
    "loop of unequal length": (
        "float a = 0;\nfor (uint i = 0;\ni <= lane;\n++i) a += simd_sum(1.0f);\ny[t] = a;",
        "divergence",
    ),
    "read beyond a buffer": ("y[t] = x[t + 1];", "buffer x"),
    "read before a buffer": ("y[t] = x[int(t) - 1];", "buffer x"),
    "write beyond a buffer": ("y[t] = 0; y[t + 64] = 1;", "buffer y"),
    "write to an input": ("const_cast<device float*>(x)[t] = 1; y[t] = 0;", "write to input x"),
    "output not written": ("if (t != 7) y[t] = 0;", "never written"),
    "output written twice": ("y[t / 2] = 0; y[t / 2 + 32] = 0;", "second thread writes"),
    "output read first": ("y[t] += 1.0f;", "read of unwritten output"),
    "misaligned vector": ("y[t] = ((const device float4*)(x + 1))[0].x;", "misaligned"),
    "local array": (
        "float v[4];\nfor (int i = 0;\ni <= n[0] + 1;\n++i) v[i] = x[i];\ny[t] = v[n[0] & 3];",
        "array index",
    ),
    "threadgroup array": ("s[t + 1] = x[t]; y[t] = 0;", "array index"),
    "lane that is not there": ("y[t] = simd_shuffle(x[t], ushort(t));", "no such lane"),
    "too much threadgroup memory": (
        "threadgroup float big[8192];\n big[t] = 0;\ns[t] = 1;\ny[t] = big[t] + s[t];",
        "32768",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name):
    body, message = FAULTS[name]
    with pytest.raises(msl.MetalError, match=message):
        run(kernel(body))


def test_clean():
    np.testing.assert_allclose(run(CLEAN), clean_result(), rtol=1e-6)


ORDERED = {
    "a simdgroup barrier orders one SIMD-group": (
        "s[t] = x[t]; simdgroup_barrier(mem_flags::mem_threadgroup); y[t] = s[t ^ 1];"
        "simdgroup_barrier(mem_flags::mem_threadgroup); s[t] = 0;"
    ),
    "a threadgroup barrier orders all": (
        "s[t] = x[t ^ 32]; threadgroup_barrier(mem_flags::mem_threadgroup); y[t] = s[t ^ 33];"
        "threadgroup_barrier(mem_flags::mem_threadgroup); s[t] = 0;"
    ),
    "a thread sees its own writes": "s[t] = x[t ^ 1]; y[t] = s[t]; s[t] = 0;",
}


@pytest.mark.parametrize("name", ORDERED)
def test_ordered(name):
    np.testing.assert_array_equal(run(kernel(ORDERED[name])), X[np.arange(64) ^ 1])


def test_the_line_of_a_fault_is_named():
    if not any(map(shutil.which, ("llvm-symbolizer-19", "addr2line"))):
        pytest.skip("needs addr2line (binutils)")
    text = kernel(
        "y[t] = f(x, t + 1);", "inline float f(const device float* p, uint i) {return p[i];}"
    )
    with pytest.raises(msl.MetalError, match=r"thread 63 of .* line 3 from line 8$"):
        run(text)


def test_only_strict_refuses_outputs_shared_by_threads():
    text = kernel("y[t] = 1; y[63 - t] = 1;")
    with pytest.raises(msl.MetalError, match="second thread writes"):
        run(text)
    assert (run(text, strict=False) == 1).all()


def test_faults_of_later_threadgroups_are_found():
    text = kernel("y[g.x * 64 + t] = x[g.x == 2 ? t + 1 : t];")
    with pytest.raises(msl.MetalError, match=r"thread 63 of threadgroup \(2,0,0\)"):
        run(text, groups=3)
    assert run(text, groups=2).size == 128


def test_threadgroup_memory_starts_unwritten_in_every_threadgroup():
    text = kernel("if (g.x == 0) s[t] = x[t]; y[g.x * 64 + t] = s[t];")
    with pytest.raises(msl.MetalError, match=r"nothing has written.*threadgroup \(1,0,0\)"):
        run(text, groups=2)


def test_a_run_after_a_fault_is_clean():
    text = kernel("y[t] = x[t + n[0]];")
    with pytest.raises(msl.MetalError, match="out of bounds"):
        run(text)
    assert (run(text, np.ones(128, np.float32)) == 1).all()


@pytest.mark.parametrize(
    ("inputs", "message"), [([X], "no input for buffer n"), ([X, N, N], "more inputs than buffers")]
)
def test_inputs_must_match_the_buffers(inputs, message):
    with pytest.raises(msl.MetalError, match=message):
        msl.run(CLEAN, inputs, [((64,), np.float32)], (64, 1, 1), (64, 1, 1))


@pytest.mark.parametrize("threads", [0, 1056])
def test_threadgroup_size_has_a_limit(threads):
    with pytest.raises(msl.MetalError, match=f"threadgroup of {threads} threads"):
        msl.run(CLEAN, [X, N], [((64,), np.float32)], (64, 1, 1), (threads, 1, 1))


def test_text_that_cannot_be_compiled():
    with pytest.raises(msl.MetalError, match="cbrt"):
        run(kernel("y[t] = cbrt(x[t]);"))


def test_unknown_position():
    with pytest.raises(msl.MetalError, match=r"unknown attribute .*quad"):
        msl.prebuild(["[[kernel]] void k(uint q [[thread_index_in_quadgroup]]) {}"])


# ---- Results


def test_partial_groups_and_positions():
    text = """[[kernel]] void k(device uint* y [[buffer(0)]],
      uint3 p [[thread_position_in_grid]], uint3 n [[threads_per_grid]],
      uint lanes [[simdgroups_per_threadgroup]], uint2 size [[threads_per_threadgroup]]) {
      y[p.y * n.x + p.x] = lanes * 100000 + size.x * 1000 + p.y * 100 + p.x;
    }"""
    got = msl.run(text, [], [((3, 50), np.uint32)], (50, 3, 1), (32, 2, 1))[0]
    row, column = np.mgrid[:3, :50]
    width, height = np.where(column < 32, 32, 18), np.where(row < 2, 2, 1)
    simdgroups = -(-width * height // 32)
    np.testing.assert_array_equal(got, simdgroups * 100000 + width * 1000 + row * 100 + column)


OPERATIONS = {
    "simd_sum(v)": lambda v: np.repeat(v.sum(), 32),
    "simd_max(v)": lambda v: np.repeat(v.max(), 32),
    "simd_min(v)": lambda v: np.repeat(v.min(), 32),
    "simd_product(v)": lambda v: np.repeat(v.prod(), 32),
    "simd_xor(v)": lambda v: np.repeat(np.bitwise_xor.reduce(v), 32),
    "simd_or(v)": lambda v: np.repeat(np.bitwise_or.reduce(v), 32),
    "simd_and(v)": lambda v: np.repeat(np.bitwise_and.reduce(v), 32),
    "simd_prefix_inclusive_sum(v)": np.cumsum,
    "simd_prefix_exclusive_sum(v)": lambda v: np.cumsum(v) - v,
    "simd_broadcast(v, ushort(5))": lambda v: np.repeat(v[5], 32),
    "simd_broadcast_first(v)": lambda v: np.repeat(v[0], 32),
    "simd_shuffle(v, ushort(31 - lane))": lambda v: v[::-1],
    "simd_shuffle_xor(v, ushort(4))": lambda v: v[np.arange(32) ^ 4],
    "simd_shuffle_up(v, ushort(3))": lambda v: np.r_[v[:3], v[:-3]],
    "simd_shuffle_down(v, ushort(3))": lambda v: np.r_[v[3:], v[-3:]],
    "simd_shuffle_rotate_up(v, ushort(3))": lambda v: np.roll(v, 3),
    "simd_shuffle_rotate_down(v, ushort(3))": lambda v: np.roll(v, -3),
    "int(simd_any(v == 4))": lambda v: np.repeat(int((v == 4).any()), 32),
    "int(simd_all(v > 0))": lambda v: np.repeat(int((v > 0).all()), 32),
    "int(ulong(simd_ballot(v > 4)))": lambda v: np.repeat(
        np.uint32(sum(1 << i for i in range(32) if v[i] > 4)).astype(np.int32), 32
    ),
}


def test_simdgroup_operations():
    statements = "".join(
        f"y[t * {len(OPERATIONS)} + {i}] = {op};\n" for i, op in enumerate(OPERATIONS)
    )
    text = f"""[[kernel]] void k(const device int* x [[buffer(0)]], device int* y [[buffer(1)]],
      uint t [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {{
      int v = x[t];
      {statements}
    }}"""
    assert msl.check(text) == []
    x = np.random.default_rng(1).integers(1, 9, 64).astype(np.int32)
    got = msl.run(text, [x], [((64, len(OPERATIONS)), np.int32)], (64, 1, 1), (64, 1, 1))[0]
    for i, (operation, expected) in enumerate(OPERATIONS.items()):
        want = np.concatenate([expected(x[:32]), expected(x[32:])]).astype(np.int32)
        np.testing.assert_array_equal(got[:, i], want, err_msg=operation)


@pytest.mark.parametrize("kind", ["float", "half"])
def test_matrix(kind):
    text = f"""[[kernel]] void k(const device {kind}* a [[buffer(0)]],
      const device {kind}* b [[buffer(1)]], device float* c [[buffer(2)]]) {{
      simdgroup_matrix<{kind}, 8, 8> A, B;
      simdgroup_matrix<float, 8, 8> C(1.0f);
      simdgroup_load(A, a);
      simdgroup_load(B, b, 8, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(C, A, B, C);
      simdgroup_store(C, c);
    }}"""
    assert msl.check(text) == []
    dtype = {"float": np.float32, "half": np.float16}[kind]
    a, b = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(dtype)
    c = msl.run(text, [a, b], [((8, 8), np.float32)], (32, 1, 1), (32, 1, 1))[0]
    want = a.astype(np.float64) @ b.astype(np.float64).T + 1
    np.testing.assert_allclose(c, want, rtol=1e-5, atol=1e-6)


def test_half_rounds_after_every_operation():
    text = """[[kernel]] void k(const device half* a [[buffer(0)]],
      device half* c [[buffer(1)]], uint t [[thread_position_in_grid]]) {
      c[t] = a[t] * a[t] + a[t];
    }"""
    a = np.random.default_rng(0).normal(size=64).astype(np.float16)
    got = msl.run(text, [a], [((64,), np.float16)], (64, 1, 1), (64, 1, 1))[0]
    np.testing.assert_array_equal(got, a * a + a)
    wide = a.astype(np.float32)
    assert (got != (wide * wide + wide).astype(np.float16)).any()


def test_denormal_floats_are_flushed():
    tiny = np.full(64, 1e-39, np.float32)
    assert (run(kernel("y[t] = x[t] + x[t];"), tiny) == 0).all()
    assert tiny[0] * np.float32(2) > 0  # the state of this thread is as before


def test_fast_math_is_another_build():
    text = kernel("float a = x[t]; y[t] = (a + 1e8f) - 1e8f;")
    assert (run(text) == np.float32(X + np.float32(1e8)) - np.float32(1e8)).all()
    assert (run(text, fast_math=True) == X).all()


def test_shapes_and_strides():
    source = """uint i = thread_position_in_grid.x;
      y[i] = x[i] + x_shape[1] * 100 + int(x_strides[0]) * 1000 + x_ndim;"""
    call = mx.fast.metal_kernel(name="shapes", input_names=["x"], output_names=["y"], source=source)
    options = dict(grid=(20, 1, 1), threadgroup=(32, 1, 1), verbose=True)
    options.update(output_shapes=[(4, 5)], output_dtypes=[mx.float32])
    text = msl.generated_text(lambda x: call(inputs=[x], **options), mx.zeros((4, 5)))
    assert msl.check(text) == []
    x = np.arange(20, dtype=np.float32).reshape(4, 5)
    got = msl.run(text, [x], [((4, 5), np.float32)], (20, 1, 1), (32, 1, 1))[0]
    np.testing.assert_array_equal(got, x + 500 + 5000 + 2)


def test_stats():
    stats = {}
    run(CLEAN, stats=stats)
    assert stats["threads"] == 64
    assert stats["threadgroup_bytes"] == 256
    assert stats["switches"] == 3 * 64  # to the start, from the barrier, from the sum


# ---- Several threads, several processes


def test_threads_may_run_kernels_at_once():
    texts = [CLEAN, kernel(f"y[t] = {'simd_sum(x[t]) + ' * 20} 0;")] * 20
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, texts))
    for clean, sums in zip(results[::2], results[1::2], strict=True):
        np.testing.assert_allclose(clean, clean_result(), rtol=1e-6)
        np.testing.assert_array_equal(sums, 20 * np.repeat([X[:32].sum(), X[32:].sum()], 32))


def test_prebuild_is_what_run_uses(monkeypatch):
    texts = [kernel(f"y[t] = x[t] + {i};") for i in range(3)]
    msl.prebuild(texts)

    def no_compiler(*_):
        raise AssertionError

    monkeypatch.setattr(compiler, "compile_kernel", no_compiler)
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(run(text), X + i)


def test_temporary_folder_goes_at_exit(tmp_path):
    code = '''
import numpy as np
from vllm_metal_tq import msl
text = """[[kernel]] void k(device uint* y [[buffer(0)]],
  uint t [[thread_position_in_grid]]) { y[t] = t; }"""
msl.check(text)
print(msl.run(text, [], [((4,), np.uint32)], (4, 1, 1), (4, 1, 1))[0].sum())
'''
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "6\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_beside_the_sources():
    msl.prebuild([CLEAN])
    folder = Path(find_spec("vllm_metal_tq.msl").origin).parent
    names = {path.name for path in folder.iterdir() if path.name != "__pycache__"}
    assert {"stdlib.h", "simulator.cpp"} == {name for name in names if not name.endswith(".py")}
