"""Estimates what decoding costs on Apple GPUs. Nothing here is measured, and no Mac takes part.

Clang compiles the Metal text that MLX would hand to Apple's compiler, the instructions of the
decode loop are counted in its LLVM IR, and a roofline model turns them into times. The IR only
approximates what Apple's compiler emits. Prints Markdown tables, those of docs/performance.md.

    python benchmarks/apple_roofline.py
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from vllm_metal_tq import openblas

openblas.preload()

import mlx.core as mx  # noqa: E402

from vllm_metal_tq import msl  # noqa: E402
from vllm_metal_tq.config import QUANT_OF, T2, T3, TRELLIS_WIDTHS, TurboQuantConfig  # noqa: E402
from vllm_metal_tq.kernels.decode import Options, decode  # noqa: E402
from vllm_metal_tq.kernels.launch import Launch  # noqa: E402
from vllm_metal_tq.layout import PageLayout  # noqa: E402
from vllm_metal_tq.msl import compiler  # noqa: E402
from vllm_metal_tq.msl.text import as_cpp  # noqa: E402

# ---- Data: all numbers that are not counted. docs/performance.md says where they come from.


@dataclass(frozen=True)
class Chip:
    """An Apple GPU.

    Attributes:
        name: its name.
        cores: GPU cores of the largest version.
        gigahertz: clock; unofficial, Apple publishes none.
        bandwidth: of memory, GB/s, as published.
        pair_slots: slots of an operation on two half floats of a lane.
    """

    name: str
    cores: int
    gigahertz: float
    bandwidth: float
    pair_slots: int = 2


CHIPS = (
    Chip("M1", 8, 1.278, 68.25),
    Chip("M2 Max", 38, 1.398, 400),
    Chip("M3 Max", 40, 1.398, 400),
    Chip("M4 Max", 40, 1.578, 546),
    Chip("M5", 10, 1.74, 153, pair_slots=1),
)

SLOTS_PER_CLOCK = 4  # instructions of SIMD-groups that a core starts in a clock
UTILISATION = 0.6  # assumed: the part of these slots that a kernel fills
MATRIX_SLOTS = 18  # an 8x8x8 multiply-accumulate; 16 would be 512 FMAs at full rate
WIDE_ADD_SLOTS = 4  # a 64-bit addition
COMPLEX_CLOCKS = 4  # shifts, integer products, exp2: a scheduler starts one in four clocks
EXCHANGE_CLOCKS = 2  # shuffles and votes
CORE_BYTES_PER_CLOCK = 64  # loads and stores of a core
MAX_REGISTERS = 128  # 32-bit registers of a thread

CLASSES = (
    "fp32", "half2", "logic", "shift", "integer", "select", "convert", "load", "store",
    "shuffle", "exp2", "matrix", "other",
)  # fmt: skip
COMPLEX = ("shift", "product", "exp2")

WIDTHS = ((4, 4), (3, 3), (2, 2), (8, 4), (T3, T3), (T2, T2))
KERNELS = (("fma", 1), ("fma", 2), ("fma", 4), ("fma", 8), ("mma", 4), ("mma", 8))
COLUMNS = (1, 2, 3, 4, 5, 6, 7, 8)
CONTEXT, KV_HEADS, DIM = 32768, 8, 128

# ---- Counting

# SIMD-group operations become calls of functions that nobody defines, one each; packed half
# floats stay packed.
_COUNTED = """
extern "C" {
__attribute__((const)) float2 count_matrix(half2, half2, float2);
__attribute__((const)) float count_shuffle(float, int);
bool count_any(bool);
}
#define simd_any(x) count_any(x)
METAL_FUNC void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<half, 8, 8> a,
    simdgroup_matrix<half, 8, 8> b, simdgroup_matrix<float, 8, 8> c) {
  d.thread_elements() = count_matrix(a.thread_elements(), b.thread_elements(), c.thread_elements());
}
METAL_FUNC float simd_shuffle_xor(float x, ushort mask) { return count_shuffle(x, mask); }
METAL_FUNC uint simd_shuffle(uint x, ushort lane) {
  return as_type<uint>(count_shuffle(as_type<float>(x), lane));
}
METAL_FUNC half2 fma(half2 a, half2 b, half2 c) { return __builtin_elementwise_fma(a, b, c); }
METAL_FUNC float max(float a, float b) { return __builtin_fmaxf(a, b); }
"""
_OPTIONS = [
    *("-std=c++17", "-DMSL_CHECK", "-w", "-O2", "-S", "-emit-llvm", "-o", "kernel.ll"),
    # A lane of a GPU has no vectors; loops unroll where the kernels say so.
    *("-fno-vectorize", "-fno-slp-vectorize", "-mllvm", "-inline-threshold=1000000"),
    # Of Metal's fast mathematics, what fuses products with sums.
    *("-fno-math-errno", "-ffp-contract=fast", "-fno-signed-zeros"),
    *("-ffreestanding", "-fno-exceptions", "-Xclang", "-ffloat16-excess-precision=none"),
]


@dataclass(frozen=True)
class Kernel:
    """What the decode loop of one kernel does for 16 tokens, per lane.

    Attributes:
        counts: instructions by class, see ``CLASSES``; and under names of their own, which other
            classes include, ``product`` (of integers), ``wide`` (64-bit sums), ``device`` and
            ``threadgroup`` (bytes).
        registers: 32-bit registers of a lane, at least: what it carries from round to round, the
            codes of a round and its logits. Addresses are not among them.
    """

    counts: dict[str, float]
    registers: int

    def slots(self, chip: Chip) -> float:
        """Issue slots of a SIMD-group, or what the busiest narrower pipe makes of them."""
        n = self.counts
        free = n["convert"]
        issued = (
            sum(n[name] for name in CLASSES) - free
            + n["half2"] * (chip.pair_slots - 1)
            + n["matrix"] * (MATRIX_SLOTS - 1)
            + n["wide"] * (WIDE_ADD_SLOTS - 1)
        )  # fmt: skip
        data = 32 * (n["device"] + n["threadgroup"])
        return max(
            issued,
            COMPLEX_CLOCKS * sum(n[name] for name in COMPLEX),
            EXCHANGE_CLOCKS * n["shuffle"],
            data / CORE_BYTES_PER_CLOCK * SLOTS_PER_CLOCK,
        )


class _Captured(Exception):  # noqa: N818
    pass


def _launch(variant: str, columns: int, layout: PageLayout) -> Launch:
    def execute(launch):
        raise _Captured(launch)

    try:
        decode(
            mx.zeros((1, columns, 1, layout.head_dim), mx.bfloat16),
            mx.zeros((8, 1, layout.page_bytes), mx.uint8),
            mx.zeros((1, 8), mx.int32),
            mx.zeros((1, 3), mx.int32),
            layout,
            Options(scale=1.0),
            max_tokens=CONTEXT,
            variant=variant,
            execute=execute,
        )
    except _Captured as captured:
        (launch,) = captured.args
    return replace(launch, template=launch.template | {"N": columns})


@lru_cache
def count(variant: str, columns: int, k_width: int, v_width: int, dim: int) -> Kernel:
    """Count the instructions of a decode kernel's loop."""
    layout = PageLayout(TurboQuantConfig(k_width, v_width), dim)
    launch = _launch(variant, columns, layout)
    text = msl.generated_text(
        lambda *arrays: launch.call("metal", *arrays, verbose=True), *launch.inputs.values()
    )
    folder = compiler.new_folder()
    try:
        result = compiler.compile_kernel(_COUNTED + as_cpp(text), _OPTIONS, folder)
        if result.returncode:
            raise msl.MetalError(result.stderr)
        ir = (folder / "kernel.ll").read_text()
    finally:
        shutil.rmtree(folder)
    sub_blocks = launch.template["NB"] if variant == "mma" else 1
    counts, carried = _count_loop(ir)
    logits = 4 * columns if variant == "fma" else 4 * sub_blocks
    registers = round(carried + counts["device"] / 4 + logits)
    return Kernel({name: counts[name] / sub_blocks for name in counts}, registers)


# ---- LLVM IR

_BLOCK = re.compile(r"^(\d+|[\w.]+):")
_INSTRUCTION = re.compile(r"^  (?:(%[\w.]+) = )?(?:(?:tail|musttail|notail) )?(\w+) ?(.*)$")
_NAME = re.compile(r"%[\w.]+")
_FREE = {
    *("phi", "bitcast", "trunc", "zext", "sext", "freeze", "insertelement", "extractelement"),
    *("shufflevector", "fneg", "ret", "unreachable"),
}
_SIMPLE = {
    **dict.fromkeys(("and", "or", "xor"), "logic"),
    **dict.fromkeys(("shl", "lshr", "ashr"), "shift"),
    **dict.fromkeys(("add", "sub", "mul"), "integer"),
    **dict.fromkeys(("fpext", "fptrunc"), "convert"),
    **dict.fromkeys(("fadd", "fsub", "fmul"), "fp32"),
    "select": "select",
}
_CALLS = {
    "llvm.fma.f32": "fp32", "llvm.fmuladd.f32": "fp32", "llvm.fma.v2f16": "half2",
    "llvm.exp2.f32": "exp2", "count_matrix": "matrix", "count_shuffle": "shuffle",
    "count_any": "shuffle", "llvm.maxnum.f32": "select", "llvm.smin.i32": "select",
    "llvm.smax.i32": "select", "llvm.umin.i32": "select", "llvm.umax.i32": "select",
}  # fmt: skip
_SIZES = {"half": 2, "i8": 1, "i16": 2, "i32": 4, "float": 4, "i64": 8, "double": 8, "ptr": 8}


@dataclass(frozen=True)
class _Instruction:
    result: str | None
    op: str
    rest: str

    @property
    def uses(self) -> set[str]:
        return set(_NAME.findall(self.rest))

    @property
    def type(self) -> str:
        words = re.sub(
            r"^(?:(?:nsw|nuw|nsz|nnan|ninf|contract|fast|exact|disjoint|samesign|inbounds|nneg"
            r"|afn|arcp|reassoc|noundef) )+",
            "",
            self.rest,
        )
        return re.match(r"<[^>]*>|\w+", words)[0]


def _count_loop(ir: str) -> tuple[Counter, float]:
    """Counts, and carried registers, of the loop in which the maximum is voted on."""
    blocks = _blocks(ir)
    after = {name: _successors(block) for name, block in blocks.items()}
    loop, latch, header = min(
        (
            (_loop(after, latch, header), latch, header)
            for latch in after
            for header in after[latch]
            if header in _reachable(after, header, stop=latch) and _dominates(after, header, latch)
        ),
        key=lambda found: (not _votes(blocks, found[0]), len(found[0])),
    )
    # What every round runs: blocks that no way through the loop avoids, and those in which some
    # lanes store. Left out are masking, which the last sub-blocks of a context need, and rescaling,
    # which is rare.
    inside = {name: [to for to in after[name] if to in loop] for name in loop}
    always = [
        name
        for name, block in blocks.items()
        if name in loop
        and (_unavoidable(inside, header, latch, name) or any(i.op == "store" for i in block))
    ]
    everything = [instruction for block in blocks.values() for instruction in block]
    users: dict[str, list[_Instruction]] = {}
    for instruction in everything:
        for name in instruction.uses:
            users.setdefault(name, []).append(instruction)
    origin = {instruction.result: instruction for instruction in everything if instruction.result}
    counts = Counter(dict.fromkeys((*CLASSES, "product", "wide", "device", "threadgroup"), 0))
    addresses: dict[str, dict[str, set]] = {"load": {}, "store": {}}
    for name in always:
        for instruction in blocks[name]:
            _classify(instruction, users, origin, counts, addresses)
    for kind, bases in addresses.items():
        counts[kind] = sum(map(_accesses, bases.values()))
    return counts, _carried(blocks, loop, header, origin)


def _votes(blocks, loop) -> bool:
    return any("@count_any" in i.rest for name in loop for i in blocks[name])


def _blocks(ir: str) -> dict[str, list[_Instruction]]:
    body = max(re.findall(r"(?ms)^define [^\n]*\{\n(.*?)^\}", ir), key=len)
    blocks, name = {"entry": []}, "entry"
    for line in body.splitlines():
        if match := _BLOCK.match(line):
            name = match[1]
            blocks[name] = []
        elif match := _INSTRUCTION.match(line):
            rest = re.sub(r"(, ![\w.]+ ?!?\d*)+$", "", match[3])
            blocks[name].append(_Instruction(match[1], match[2], rest))
    return blocks


def _successors(block: list[_Instruction]) -> list[str]:
    return re.findall(r"label %([\w.]+)", block[-1].rest) if block else []


def _reachable(after, start: str, stop: str | None = None, without: str | None = None) -> set[str]:
    """Blocks that a way from ``start`` meets, which ends at ``stop``."""
    found, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name in found or name == without:
            continue
        found.add(name)
        if name != stop:
            todo += after.get(name, ())
    return found


def _dominates(after, header: str, latch: str) -> bool:
    first = next(iter(after))
    return header == first or latch not in _reachable(after, first, without=header)


def _loop(after, latch: str, header: str) -> set[str]:
    before: dict[str, list[str]] = {}
    for name, targets in after.items():
        for target in targets:
            before.setdefault(target, []).append(name)
    return _reachable(before, latch, stop=header) if latch != header else {header}


def _unavoidable(inside, header: str, latch: str, name: str) -> bool:
    return name in (header, latch) or latch not in _reachable(inside, header, without=name)


def _classify(instruction, users, origin, counts, addresses) -> None:
    op, rest = instruction.op, instruction.rest
    mine = users.get(instruction.result, [])
    if op in _FREE or (op == "br" and "," not in rest):
        return
    if op in ("load", "store"):
        _access(instruction, origin, counts, addresses)
    elif op == "call":
        callee = re.search(r"@([\w.]+)\(", rest)[1]
        if callee != "msl_barrier" and not callee.startswith(("llvm.lifetime", "llvm.assume")):
            counts[_CALLS.get(callee, "other")] += 1
        else:
            counts["other"] += 1
    elif op == "getelementptr":
        # Constant offsets are part of a load.
        counts["integer"] += not re.search(r"i(?:32|64) -?\d+$", rest)
    elif op == "lshr" and rest.endswith(", 16") and all(user.op == "trunc" for user in mine):
        pass  # the high half of a register
    elif op in ("icmp", "fcmp") and all(user.op in ("select", "br") for user in mine):
        pass  # compare-and-select and compare-and-branch are one instruction
    elif op in _SIMPLE:
        kind = _SIMPLE[op]
        if instruction.type == "<2 x half>":
            kind = "half2"
        counts[kind] += 1
        counts["product"] += op == "mul"
        counts["wide"] += kind == "integer" and instruction.type == "i64"
    else:
        counts["other"] += 1


def _access(instruction, origin, counts, addresses) -> None:
    match = re.search(r"(<\d+ x \w+>|\w+)(?: %[^,]+| [^,]+)?, ptr(?: addrspace\((\d)\))? (\S+),",
                      instruction.rest)  # fmt: skip
    size, space, address = _size(match[1]), match[2], match[3]
    offset = 0
    while (at := origin.get(address)) and at.op == "getelementptr":
        constant = re.search(r"\bi8, ptr[^%]*(%[\w.]+), i64 (-?\d+)$", at.rest)
        if not constant:
            break
        address, offset = constant[1], offset + int(constant[2])
    addresses[instruction.op].setdefault(address, set()).add((offset, size))
    counts["threadgroup" if space == "3" else "device"] += size


def _accesses(parts: set[tuple[int, int]]) -> int:
    """Instructions for these bytes: a lane loads up to 16 bytes that lie together."""
    number, end, room = 0, None, 0
    for offset, size in sorted(parts):
        if offset == end and size <= room:
            end, room = end + size, room - size
        else:
            number, end, room = number + 1, offset + size, 16 - size
    return number


def _carried(blocks, loop, header: str, origin) -> float:
    """Registers of the values that a round of the loop takes over from what was before it."""
    inside = [instruction for name in loop for instruction in blocks[name]]
    used = {name for i in inside if i.op != "phi" for name in i.uses}
    multiplied = {name for i in inside if "@count_matrix(" in i.rest for name in i.uses}
    before = {origin[name] for name in used if name in origin} - set(inside)
    carried = {instruction for instruction in blocks[header] if instruction.op == "phi"}
    # Integers are addresses and bounds, but for half floats that a matrix takes.
    return sum(
        0.5 if i.op == "fpext" else max(_size(i.type) / 4, 0.5)
        for i in before | carried
        if i.op not in ("icmp", "fcmp", "getelementptr")
        and (i.type not in ("i1", "i32", "i64", "ptr") or i.result in multiplied or _is_sum(i))
    )


def _is_sum(instruction: _Instruction) -> bool:
    # Clang holds two sums of a matrix in an integer.
    return instruction.op == "phi" and instruction.type == "i64"


def _size(kind: str) -> int:
    vector = re.match(r"<(\d+) x (\w+)>", kind)
    return int(vector[1]) * _SIZES[vector[2]] if vector else _SIZES[kind]


# ---- Roofline


@dataclass(frozen=True)
class Time:
    """Microseconds of one layer's attention, by either limit."""

    memory: float
    compute: float

    @property
    def total(self) -> float:
        """The roofline."""
        return max(self.memory, self.compute)


def bf16_time(chip: Chip, dim: int = DIM) -> float:
    """What reading an uncompressed cache takes, in microseconds."""
    return CONTEXT * KV_HEADS * 4 * dim / chip.bandwidth / 1e3


def passes_of_fma(columns: int, k_width: int, v_width: int, dim: int) -> int:
    """How often pages are read so that what a lane holds fits its registers."""
    passes = 1
    while True:
        kernel = count("fma", -(-columns // passes), k_width, v_width, dim)
        if kernel.registers <= MAX_REGISTERS or passes >= columns:
            return passes
        passes += 1


def time(
    chip: Chip, variant: str, columns: int, k_width: int, v_width: int, dim: int = DIM
) -> Time:
    """What attention of a layer takes, for one sequence of ``CONTEXT`` tokens.

    Args:
        chip: the GPU.
        variant: ``fma`` or ``mma``.
        columns: query heads of a KV head, times query rows.
        k_width: code of keys, one of ``config.WIDTHS``.
        v_width: likewise of values.
        dim: head_dim.
    """
    layout = PageLayout(TurboQuantConfig(k_width, v_width), dim)
    passes = passes_of_fma(columns, k_width, v_width, dim) if variant == "fma" else 1
    sub_blocks = passes * KV_HEADS * CONTEXT / 16
    kernel = count(variant, -(-columns // passes), k_width, v_width, dim)
    rate = chip.cores * chip.gigahertz * 1e3 * SLOTS_PER_CLOCK * UTILISATION
    return Time(
        sub_blocks * 16 * layout.row_bytes / chip.bandwidth / 1e3,
        sub_blocks * kernel.slots(chip) / rate,
    )


# ---- Tables


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rounded(x: float) -> str:
    return f"{int(x + 0.5):,}"


def _bits(k_width: int, v_width: int) -> str:
    return " / ".join(QUANT_OF[w] if w in TRELLIS_WIDTHS else str(w) for w in (k_width, v_width))


def instruction_table(dim: int) -> str:
    rows = []
    for k_width, v_width in WIDTHS:
        for variant, columns in KERNELS:
            n = count(variant, columns, k_width, v_width, dim).counts
            row = [_bits(k_width, v_width), variant, str(columns)]
            row += [_rounded(n[name]) for name in CLASSES]
            row += [_rounded(32 * n[name]) for name in ("device", "threadgroup")]
            if rows and rows[-1][:2] == row[:2] and rows[-1][3:] == row[3:]:
                rows[-1][2] += f", {columns}"
            else:
                rows.append(row)
    return table(["bits", "kernel", "N", *CLASSES, "bytes", "bytes, threadgroup"], rows)


def choice_table(k_width: int, v_width: int, dim: int) -> str:
    chip, rows = CHIPS[0], []
    for columns in COLUMNS:
        one = count("fma", columns, k_width, v_width, dim)
        passes = passes_of_fma(columns, k_width, v_width, dim)
        share = count("fma", -(-columns // passes), k_width, v_width, dim)
        fma = passes * share.slots(chip)
        mma = count("mma", columns, k_width, v_width, dim).slots(chip)
        rows.append(
            [
                *(str(columns), _rounded(one.slots(chip)), str(one.registers), str(passes)),
                *(_rounded(fma), _rounded(mma), "fma" if fma <= mma else "mma"),
            ]
        )
    return table(
        ["N", "fma, one pass", "its registers", "passes", "fma", "mma", "fewer"],
        rows,
    )


def roofline_table(columns: int) -> str:
    rows = []
    for chip in CHIPS:
        row = [chip.name, _rounded(bf16_time(chip))]
        for bits in ((4, 4), (3, 3), (8, 4)):
            ways = {variant: time(chip, variant, columns, *bits) for variant in ("fma", "mma")}
            name = min(ways, key=lambda way: ways[way].total)
            best = ways[name]
            bound = "memory" if best.memory >= best.compute else "instructions"
            row.append(f"{_rounded(best.total)} ({name}, {bound})")
            row.append(f"{bf16_time(chip) / best.total:.1f}x")
        rows.append(row)
    return table(["", "bf16", "tq4", "", "q3_0", "", "q8_0 / q4_0", ""], rows)


def variant_table(k_width: int, v_width: int) -> str:
    rows = []
    for columns in COLUMNS:
        row = [str(columns)]
        for chip in CHIPS:
            fma, mma = (time(chip, way, columns, k_width, v_width).total for way in ("fma", "mma"))
            marks = ("**", "") if fma <= mma else ("", "**")
            row.append(
                " / ".join(f"{m}{_rounded(t)}{m}" for m, t in zip(marks, (fma, mma), strict=True))
            )
        rows.append(row)
    return table(["N", *(chip.name for chip in CHIPS)], rows)


def main() -> None:
    if msl.find_clang() is None:
        sys.exit(f"Nothing counted: {compiler.INSTALL_HINT}")
    for dim in (128, 64):
        print(f"Instructions of a SIMD-group per 16 tokens, head_dim {dim}\n")
        print(instruction_table(dim), end="\n\n")
    for dim in (64, 128, 256):
        for bits in ((4, 4), (3, 3)):
            print(f"ESTIMATE, slots per 16 tokens, head_dim {dim}, {bits[0]} / {bits[1]} bits\n")
            print(choice_table(*bits, dim), end="\n\n")
    for columns in (1, 4, 8):
        print(f"ESTIMATE, us a layer: {CONTEXT} tokens, {KV_HEADS} KV heads, N = {columns}\n")
        print(roofline_table(columns), end="\n\n")
    print("ESTIMATE, us a layer, fma / mma: 4 / 4 bits\n")
    print(variant_table(4, 4))


if __name__ == "__main__":
    main()
