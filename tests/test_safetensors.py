"""Files that say of themselves what is not so are refused before MLX reads them."""

import json
import struct

import mlx.core as mx
import pytest

from vllm_metal_tq import safetensors

DATA = bytes(range(64))


def entry(**changes):
    return {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | changes


def written(file, header, data=DATA):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.safetensors"


def test_arrays_and_metadata_come_back(file):
    arrays, metadata = safetensors.read(written(file, {"__metadata__": {"a": "b"}, "x": entry()}))
    assert metadata == {"a": "b"}
    assert mx.array_equal(arrays["x"].view(mx.uint8), mx.array(list(DATA), mx.uint8))


@pytest.mark.parametrize(
    "header",
    [
        {"x": entry(shape=[1 << 20, 1 << 18])},  # a terabyte
        {"x": entry(shape=[-4, -4])},
        {"x": entry(shape=[(1 << 32) + 16])},  # 16, where 32 bits are taken of it
        {"x": entry(), "y": entry(shape=[0, 1 << 40], data_offsets=[64, 64])},
        {"x": entry(shape=[1.5])},
        {"x": entry(data_offsets=[1 << 40, (1 << 40) + 64])},
        {"x": entry(data_offsets=[64, 0])},
        {"x": entry(), "y": entry()},  # of the same bytes
        {"x": entry(dtype="F99")},
        {"x": {}},
        {"__metadata__": {"a": 5}, "x": entry()},
        [1],
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b'{"\xff": 5}',
        b"",
    ],
)
def test_a_header_that_is_wrong_is_refused(file, header, monkeypatch):
    monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("MLX has read it"))
    with pytest.raises(ValueError, match=r"no safetensors|has shape"):
        safetensors.read(written(file, header))


@pytest.mark.parametrize("length", [0, 7, 8, 20, 100])
def test_a_file_that_is_cut_is_refused(file, length):
    data = written(file, {"x": entry()}).read_bytes()
    file.write_bytes(data[:length])
    with pytest.raises(ValueError, match="no safetensors"):
        safetensors.read(file)
