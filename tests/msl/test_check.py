from dataclasses import dataclass

import mlx.core as mx
import pytest
from planted import CLEAN, kernel, needs_clang, needs_simulator

from vllm_metal_tq import msl
from vllm_metal_tq.msl import compiler

pytestmark = needs_clang
STANDARDS = ["c++14", "c++17"]


@dataclass
class Planted:
    body: str
    message: str
    before: str = ""


# What Metal has not; without the planted piece the kernel is the one that test_clean accepts.
REFUSED = {
    "array of no elements": Planted(
        "y[t] = f<1>();",
        "zero size",
        "template <int N> inline float f() {\n float a[N / 2];\n return N > 1 ? a[0] : 0.0f;\n}",
    ),
    "device pointer from a threadgroup array": Planted(
        "device float* p = s; y[t] = p[0];", r"line 8: cannot initialize .* 'device float \*'"
    ),
    "thread pointer from a device one": Planted(
        "thread const float* p = x; y[t] = p[0];",
        r"line 8: cannot initialize .* 'device float const",
    ),
    "constant pointer to a device parameter": Planted(
        "y[t] = float(f(n));",
        r"line 8: no matching function",
        before="inline int f(const device int* p) { return p[0]; }",
    ),
    "cast between address spaces": Planted(
        "device float* p = (device float*)s; y[t] = p[0];", r"line 8: cast between address spaces"
    ),
    "reinterpret_cast between address spaces": Planted(
        "y[t] = *reinterpret_cast<const device float*>(n);",
        r"line 8: reinterpret_cast .* is not allowed",
    ),
    "pointer without address space": Planted(
        "y[t] = f(0.0f);",
        r"line 3: pointer or reference without an address space",
        before="inline float f(float* p) { return p[0]; }",
    ),
    "local pointer without address space": Planted(
        "float v[2] = {0, 1}; float* p = v; y[t] = p[0];",
        r"line 8: pointer or reference without an address space",
    ),
    "write through const": Planted("x[t] = 1.0f;", r"line 8: read-only variable"),
    "write to constant": Planted("((constant int*)n)[0] = 1;", r"line 8: read-only variable"),
    "lambda": Planted("auto f = [](float a) { return a; }; y[t] = f(1.0f);", r"line 8: lambda"),
    "double": Planted("double a = 1.0; y[t] = a;", r"double_is_not_in_Metal"),
    "long double literal": Planted("y[t] = float(1.0L);", r"line 8: double"),
    "long long": Planted("long long a = n[0]; y[t] = float(a);", r"line 8: long long"),
    "long long literal": Planted("y[t] = float(n[0] + 1LL);", r"line 8: long long"),
    "undefined function": Planted("y[t] = cbrt(x[t]);", r"undeclared identifier 'cbrt'"),
    "C library function": Planted("y[t] = expf(x[t]);", r"undeclared identifier 'expf'"),
    "goto": Planted("goto end; end: y[t] = 0;", r"goto_is_not_in_Metal"),
    "new": Planted("y[t] = *(new float(1));", r"new_is_not_in_Metal"),
    "exception": Planted("if (n[0]) throw 1;", r"throw_is_not_in_Metal"),
    "virtual": Planted(
        "y[t] = 0;",
        r"line 3: .*virtual_is_not_in_Metal",
        before="struct S { virtual float f() { return 1; } };",
    ),
    "static local": Planted("static int a = 0; y[t] = a;", r"line 8: static local variable"),
    "function pointer": Planted(
        "float (*f)(float) = &h; y[t] = f(1.0f);",
        r"line 8: function pointer",
        before="inline float h(float a) { return a; }",
    ),
    "recursion": Planted(
        "y[t] = f(3);",
        r"line 3: recursion of f",
        before="inline int f(int a) { return a < 1 ? 0 : 1 + f(a - 1); }",
    ),
    "recursion of a declared function": Planted(
        "y[t] = f(3);",
        r"line [34]: recursion of f",
        before="inline int f(int a);\ninline int f(int a) { return a < 1 ? 0 : 1 + f(a - 1); }",
    ),
    "mutual recursion": Planted(
        "y[t] = f(3);",
        r"line [34]: recursion of [fh]",
        before="inline int f(int a);\n"
        "inline int h(int a) { return f(a);\n"
        "}\n"
        "inline int f(int a) { return a < 1 ? 0 : h(a - 1);\n"
        "}",
    ),
    "template recursion at run time": Planted(
        "y[t] = f<2>(3);",
        r"line 3: recursion of f",
        before="template <int N> inline int f(int a) { return a < 1 ? N : 1 + f<N>(a - 1);\n}",
    ),
    "narrowing in braces": Planted(
        "int a = n[0];\nfloat2 v = {x[0], x[1]};\nchar b{a};\ny[t] = b + v.x;",
        r"line 10: .*cannot be narrowed from type 'int' to 'char'",
    ),
    "vector of the wrong size": Planted(
        "y[t] = float4(1.0f, 2.0f).x;", r"line 8: .*wrong number of components"
    ),
    "vector conversion without a constructor": Planted(
        "float2 a = int2(1, 2); y[t] = a.x;", r"line 8: cannot initialize .* 'float2'"
    ),
    "swizzle beyond the vector": Planted(
        "y[t] = float2(1, 2).z;", r"line 8: vector component access exceeds"
    ),
    "mixed types in max": Planted(
        "y[t] = max(x[t], 0);", r"no matching function for call to 'max'"
    ),
    "64-bit shuffle": Planted(
        "y[t] = float(simd_shuffle_xor(long(n[0]), ushort(1)));",
        r"no matching function for call to 'simd_shuffle_xor'",
    ),
    "as_type of another size": Planted(
        "y[t] = as_type<float>(half(1.0f));", r"line 8: .*as_type: sizes differ"
    ),
    "standard header": Planted(
        "y[t] = 0;", r"line 3: 'cmath' file not found", before="#include <cmath>"
    ),
    "std::": Planted("y[t] = std::max(1.0f, 2.0f);", r"undeclared identifier 'std'"),
    "float to bfloat without a cast": Planted(
        "bfloat b = x[0]; y[t] = b;", r"line 8: implicit conversion to bfloat"
    ),
    "bfloat result returned as half": Planted(
        "half h = f(x[0]); y[t] = h;",
        r"line 8: cannot initialize .* 'half'",
        before="inline bfloat f(float a) { return a; }",
    ),
    "function on a vector of bfloat": Planted(
        "y[t] = float(fma(bfloat2(1), bfloat2(1), bfloat2(1)).x);",
        r"no matching function for call to 'fma'",
    ),
    "name of MLX's prelude": Planted(
        "y[t] = 0;",
        r"line 3: redefinition of 'Limits'",
        before="template <typename U> struct Limits { int a; };",
    ),
    "program-scope variable": Planted(
        "y[t] = K;", r"line 3: variable outside functions", before="static constexpr float K = 3;"
    ),
    "static member that is not constant": Planted(
        "y[t] = S::K;",
        r"line 3: variable outside functions",
        before="struct S { static constexpr int K = 3; };",
    ),
    "variable set on one path only": Planted(
        "float a; if (n[0] > 2) a = 1; y[t] = a;", r"line 8: variable 'a' is used uninitialized"
    ),
    "reserved word": Planted(
        "float vertex = x[0]; y[t] = vertex;", r"line 8: vertex is a word of Metal"
    ),
    "threadgroup variable in a helper": Planted(
        "y[t] = f(t);",
        r"line 4: threadgroup variable outside a kernel",
        before="inline float f(uint t) {\n"
        "  threadgroup float z[32];\n"
        "  z[t] = 1;\n"
        "  return z[t];\n"
        "}",
    ),
    "threadgroup variable with a value": Planted(
        "threadgroup float z = 1.0f;\n y[t] = z;", r"line 8: automatic variable qualified"
    ),
    "device variable in a body": Planted(
        "device float z[4];\n y[t] = z[0];", r"line 8: automatic variable qualified"
    ),
    "threadgroup pointer kept in a thread struct": Planted(
        "S q; q.p = x; y[t] = q.p[0];",
        r"line 8: .*changes address space",
        before="struct S { threadgroup float* p; };",
    ),
    "reference to another address space": Planted(
        "threadgroup float4 z[4];\n thread float4& r = z[0];\ny[t] = r.x;",
        r"line 9: .*changes address space",
    ),
    "missing return": Planted(
        "y[t] = f(1);",
        r"line 3: .*does not return a value",
        before="inline float f(int a) { if (a > 2) return 1; }",
    ),
    "matrix of 16x16": Planted(
        "simdgroup_matrix<float, 16, 16> m; y[t] = 0;",
        r"line 8: .*simdgroup_matrix: half, bfloat or float, 8x8",
    ),
    "position that is no parameter": Planted(
        "y[t] = thread_position_in_grid.x;", r"undeclared identifier 'thread_position_in_grid'"
    ),
}

ALLOWED = {
    "bfloat with a cast": kernel("bfloat b = bfloat(x[0]); y[t] = b * 2.0f;"),
    "half from float": kernel("half h = x[0]; y[t] = h;"),
    "constant table": kernel("y[t] = table[t & 3];", "constant float table[4] = {1, 2, 3, 4};"),
    "static constexpr constant": kernel("y[t] = K;", "static constexpr constant float K = 3;"),
    "pointer kept in a struct": kernel(
        "S q; q.p = x; y[t] = q.p[0];", "struct S { const device float* p; };"
    ),
    "helper of any address space": kernel(
        "s[t] = x[t]; y[t] = f(x) + f(s) + f(n);",
        "template <class P> inline float f(P p) { return float(p[0]);\n}",
    ),
    "overloads of two address spaces": kernel(
        "s[t] = x[t]; y[t] = f(x) + f(s);",
        "inline float f(const device float* p) { return p[0];\n"
        "}\n"
        "inline float f(const threadgroup float* p) { return p[0];\n"
        "}",
    ),
    "vector through both": kernel(
        "threadgroup float4 z[4];\n"
        " z[t & 3] = *(const device float4*)x;\n"
        "float4 a = z[0];\n"
        "a.xy = z[1].zw;\n"
        "y[t] = dot(a, float4(x[0], a.yz, 1)) + ((threadgroup float*)z)[1];"
    ),
    "MLX's prelude": kernel(
        "y[t] = Limits<float>::finite_max + float(Limits<half>::min) + ceildiv(3, 2)\n"
        "+ WorkPerThread<float>::n + float(float16_t(log1p(0.5f)));"
    ),
    "static constant member": kernel(
        "y[t] = S<3>::K + M_PI_F;",
        "template <int N> struct S { static constexpr constant int K = N;\n};",
    ),
    "template recursion": kernel(
        "y[t] = f<4>();",
        "template <int N> inline float f() { return 1 + f<N - 1>();\n"
        "}\n"
        "template <> inline float f<0>() { return 0;\n"
        "}",
    ),
    "integers": kernel(
        "uint a = popcount(t) + clz(t + 1) + ctz(t | 8) + mulhi(t, 3u);\n"
        "int2 b = abs(int2(-1, 2));\n"
        "y[t] = float(clamp(int(a), 0, 5) + b.x) + (any(b == int2(1, 0)) ? 1.0f : 0.0f);"
    ),
}


@pytest.mark.parametrize("std", STANDARDS)
def test_clean(std):
    assert msl.check(CLEAN, std) == []


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    planted = REFUSED[name]
    with pytest.raises(msl.MetalError, match=planted.message):
        msl.check(kernel(planted.body, planted.before))


@pytest.mark.parametrize("std", STANDARDS)
@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name, std):
    assert msl.check(ALLOWED[name], std) == []


def test_all_faults_are_reported_together():
    with pytest.raises(msl.MetalError) as caught:
        msl.check(kernel("float vertex = cbrt(x[t]);\n y[t] = expf(vertex);"))
    for fault in ("vertex is a word", "line 8: .*'cbrt'", "line 9: .*'expf'"):
        assert caught.match(fault)


def test_warnings_are_returned():
    warnings = msl.check(kernel("y[t] = x[t]; uint a; if (a = n[0]) y[t] = 0;"))
    assert len(warnings) == 1
    assert warnings[0].startswith("line 8: using the result of an assignment as a condition")


def test_more_buffers_than_an_argument_table_has():
    def text(count):
        buffers = ", ".join(f"device float* b{i} [[buffer({i})]]" for i in range(count))
        return f"[[kernel]] void k({buffers}) {{ b0[0] = 0; }}"

    assert msl.check(text(31)) == []
    with pytest.raises(msl.MetalError, match="more than 31 buffers"):
        msl.check(text(32))


def test_comments_are_not_code():
    assert msl.check(kernel("y[t] = 0; // float* p; a vertex; goto double\n/* std::max */")) == []


@needs_simulator
@pytest.mark.parametrize(("size", "fine"), [(7, False), (8, True)])
def test_small_inputs_are_constant(size, fine):
    call = mx.fast.metal_kernel(
        name="small",
        input_names=["x"],
        output_names=["y"],
        header="inline float first(const device float* p) { return p[0]; }",
        source="y[thread_position_in_grid.x] = first(x);",
    )
    options = dict(grid=(32, 1, 1), threadgroup=(32, 1, 1), verbose=True)
    options.update(output_shapes=[(32,)], output_dtypes=[mx.float32])
    text = msl.generated_text(lambda x: call(inputs=[x], **options), mx.zeros(size))
    if fine:
        assert msl.check(text) == []
    else:
        with pytest.raises(msl.MetalError, match="no matching function for call to 'first'"):
            msl.check(text)


def test_no_clang_is_an_error(monkeypatch):
    monkeypatch.setattr(compiler, "find_clang", lambda: None)
    with pytest.raises(msl.MetalError, match="pip install ziglang"):
        msl.check(CLEAN)


@pytest.mark.parametrize(
    ("version", "fine"),
    [
        ("Debian clang version 19.1.7 (3~deb12u1)", True),
        ("clang version 22.1.8", True),
        ("Debian clang version 14.0.6", False),
        ("Apple clang version 21.0.0 (clang-2100.0.1)", False),
        ("g++ (Debian 12.2.0) 12.2.0", False),
    ],
)
def test_which_clang_is_taken(version, fine, tmp_path, monkeypatch):
    program = tmp_path / "clang++"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiler, "_zig", lambda: None)
    assert compiler.find_clang.__wrapped__() == ([str(program)] if fine else None)


def test_clang_of_ziglang_is_the_last_resort(monkeypatch):
    zig = compiler._zig()
    if zig is None:
        pytest.skip("needs ziglang")
    monkeypatch.setenv("PATH", "")
    found = compiler.find_clang.__wrapped__()
    assert found == [zig, "clang", "--driver-mode=g++"]


def test_check_leaves_no_folder_behind():
    root = compiler.new_folder().parent
    before = sorted(root.iterdir())
    msl.check(CLEAN)
    with pytest.raises(msl.MetalError):
        msl.check(kernel("cbrt(1);"))
    assert sorted(root.iterdir()) == before
