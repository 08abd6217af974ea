"""What is done to good inputs: values in JSON, bytes, and the parts of a safetensors file."""

import json
import math
import struct
from copy import deepcopy

from hypothesis import strategies as st

EDGES = (
    *(0, 1, -1, 2, 3, 15, 16, 17, 255, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**40, 2**53, 2**63, 2**64, 10**30, 10**400),
    *(0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf),
)
"""Numbers that are somewhere the last or the first of their kind."""

numbers = st.sampled_from(EDGES) | st.integers(-4, 40)
texts = st.text(max_size=8) | st.sampled_from(
    ["", " ", "\0", "a\nb", "../..", "nan", "1e999", "é" * 9]
)
scalars = st.none() | st.booleans() | numbers | texts
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def mostly(good, odd, share=8):
    """Values of ``good``, and one in so many of ``odd``."""
    return st.sampled_from([odd] + [good] * (share - 1)).flatmap(lambda kind: kind)


def places(value, path=()):
    """Paths of everything inside a JSON value, itself the first."""
    yield path
    inside = {dict: lambda: value.items(), list: lambda: enumerate(value)}
    for key, inner in inside.get(type(value), tuple)():
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw, value, replacements=json_values, most=3):
    """A JSON value with a few of its parts replaced, removed, or doubled."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        paths = list(places(value))[1:]
        if not paths:
            return draw(replacements)
        *above, key = draw(st.sampled_from(paths))
        holder = value
        for step in above:
            holder = holder[step]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "double"])):
            case "replace":
                holder[key] = draw(replacements)
            case "remove":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.append(deepcopy(holder[key]))
            case "double":
                holder[draw(texts)] = deepcopy(holder[key])
    return value


@st.composite
def damaged(draw, data: bytes, most=4) -> bytes:
    """Bytes with flips, cuts, insertions and pieces that were moved."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "flip", "byte", "cut", "insert", "remove", "repeat"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if data:
                data[at] = draw(st.sampled_from([0, 0x7F, 0x80, 0xFF, *b'"{[,:9']))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "remove":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


DTYPES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8},
}
"""Types of safetensors and bytes of an element."""


class File:
    """A safetensors file taken apart.

    Attributes:
        arrays: name -> ``[dtype, shape, bytes]``.
        metadata: its strings.
    """

    def __init__(self, data: bytes):
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        self.metadata = header.pop("__metadata__", {})
        rest = data[8 + size :]
        self.arrays = {
            name: [info["dtype"], info["shape"], rest[slice(*info["data_offsets"])]]
            for name, info in header.items()
        }

    def header(self):
        """The header as JSON has it, of what the arrays are now."""
        header, start = {"__metadata__": self.metadata}, 0
        for name, (dtype, shape, data) in self.arrays.items():
            end = start + len(data)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            start = end
        return header

    @property
    def data(self) -> bytes:
        return b"".join(data for _, _, data in self.arrays.values())


def written(header: object, data: bytes) -> bytes:
    """The bytes of a file with this header: JSON, or bytes as they are."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def contents(draw, size: int) -> bytes:
    """So many bytes of an array: all the same, or a short pattern again and again."""
    pattern = draw(
        st.sampled_from(
            [b"\0", b"\xff", b"\x00\x7c", b"\x00\x7e", b"\xff\x7b", b"\x00\x00\xc0\x7f"]
        )
        | st.binary(min_size=1, max_size=8)
    )
    return (pattern * (size // len(pattern) + 1))[:size]


@st.composite
def other_arrays(draw, file: File) -> File:
    """The file with arrays of other types, shapes and contents, whose header fits them."""
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(file.arrays)))
        dtype, shape, data = file.arrays[name]
        match draw(st.sampled_from(["shape", "dtype", "content", "remove", "rename", "swap"])):
            case "shape":
                shape = list(shape)
                sizes = st.sampled_from([0, 1, 2, 3, 7, 16, 33])
                if shape and draw(st.booleans()):
                    shape[draw(st.integers(0, len(shape) - 1))] = draw(sizes)
                else:
                    shape = draw(st.lists(sizes, max_size=5))
            case "dtype":
                dtype = draw(st.sampled_from(sorted(DTYPES)))
            case "content":
                data = draw(contents(len(data)) | damaged(data))
            case "remove":
                del file.arrays[name]
                if not file.arrays:
                    return file
                continue
            case "rename":
                file.arrays[draw(texts)] = file.arrays.pop(name)
                continue
            case "swap":
                other = draw(st.sampled_from(sorted(file.arrays)))
                file.arrays[name], file.arrays[other] = file.arrays[other], file.arrays[name]
                continue
        size = math.prod(shape) * DTYPES.get(dtype, 1)
        if size > 1 << 20:
            continue
        file.arrays[name] = [
            dtype,
            shape,
            (data * (size // max(len(data), 1) + 1))[:size].ljust(size, b"\0"),
        ]
    return file


@st.composite
def other_integers(draw, file: File, name: str) -> File:
    """The file with other numbers in its int32 array ``name``."""
    dtype, shape, data = file.arrays[name]
    values = [*struct.unpack(f"<{len(data) // 4}i", data)]
    near = st.sampled_from([-1, 1, 16, -16])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(values) - 1))
        edges = [x for x in EDGES if isinstance(x, int) and -(2**31) <= x < 2**31]
        value = values[at] + draw(near) if draw(st.booleans()) else draw(st.sampled_from(edges))
        values[at] = min(max(value, -(2**31)), 2**31 - 1)
    if draw(st.integers(0, 5)) == 0:
        values = values[: draw(st.integers(0, len(values)))] + draw(
            st.lists(st.sampled_from([-1, 0, 1, 2**31 - 1]), max_size=2)
        )
        shape = [len(values)]
    file.arrays[name] = [dtype, shape, struct.pack(f"<{len(values)}i", *values)]
    return file


@st.composite
def hostile_headers(draw, header: dict) -> bytes:
    """A header's text as no program writes it, or with claims that nothing bears out."""
    text = json.dumps(header, separators=(",", ":")).encode()
    match draw(st.sampled_from(["values", "values", "deep", "twice", "bytes", "text"])):
        case "values":
            arrays = {k: v for k, v in header.items() if k != "__metadata__"}
            claims = st.sampled_from(sorted(DTYPES)) | numbers | json_values
            return json.dumps(header | draw(mutated(arrays, claims))).encode()
        case "deep":
            depth = draw(st.sampled_from([100, 1000, 100_000]))
            inner = draw(st.sampled_from([b"[", b'{"a":'])) * depth
            return text[:-1] + b',"deep":' + inner + b"}"
        case "twice":
            name = draw(st.sampled_from(sorted(header)))
            again = json.dumps({name: draw(mutated({name: header[name]}))}).encode()
            return text[:-1] + b"," + again[1:]
        case "bytes":
            return draw(damaged(text))
        case "text":
            return draw(st.binary(max_size=32) | json_values.map(lambda x: json.dumps(x).encode()))
