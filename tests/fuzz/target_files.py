"""Prompt caches and calibrations that were damaged, or forged under a checksum that holds."""

import hashlib
import json
import re
import struct
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path

import mlx.core as mx
import models
from harness import Finding, Target, refusal
from hypothesis import strategies as st
from kinds import NAMED
from mutations import (
    File,
    damaged,
    hostile_headers,
    json_values,
    mutated,
    other_arrays,
    other_integers,
    written,
)

from vllm_metal_tq import (
    TurboQuantConfig,
    calibration,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from vllm_metal_tq.integrations.mlx_lm import calibrate
from vllm_metal_tq.integrations.mlx_lm.parts import all_compressed, parts

BLANK = b"0" * 64
SMALL = {"head_dim": 8, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY = {
    "windows": ("llama with windows", {"sliding_window": 20}),
    "shared": (
        "gemma4_text with shared keys",
        {"global_head_dim": 16, "num_hidden_layers": 4, "sliding_window": 20},
    ),
    "states": (
        "falcon_h1",
        {"num_hidden_layers": 2, "mamba_d_ssm": 16, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "unequal": (
        "mimo_v2_flash",
        {"head_dim": 16, "swa_head_dim": 16, "v_head_dim": 8, "swa_v_head_dim": 8}
        | {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 1},
    ),
}
"""Good files of other kinds than a plain llama: of which kind, and what makes its model small."""
CLASSES = [
    *("KVCache", "RotatingKVCache", "ArraysCache", "CacheList"),
    *("TurboQuantKVCache", "SharedKVCache", "FetchedKVCache"),
]
HEAD_DIM, WINDOW, CENTRED, V_HEAD_DIM = 4, 7, 11, 12  # in a cache's own header


@cache
def _folder():
    return tempfile.TemporaryDirectory()  # kept as long as the process


def _file(name: str) -> Path:
    return Path(_folder().name) / name


@cache
def model(name: str = ""):
    """The model of a good file: a plain llama where it is of no other kind."""
    if name not in TINY:
        return models.llama(num_hidden_layers=2, **SMALL)
    of, fields = TINY[name]
    return models.build(NAMED[of].model_type, **NAMED[of].fields | SMALL | fields)


@cache
def measured():
    return calibrate(model(), models.tokens(100)[0].tolist())


def _kind(name: str) -> str:
    return name if name in TINY else ""


@cache
def prompt_caches() -> dict[str, bytes]:
    """Good files by what is special about them."""
    made = {
        "plain": make_prompt_cache(model(), TurboQuantConfig(2, 2)),
        "centred": make_prompt_cache(model(), TurboQuantConfig(4, 3, 32), calibration=measured()),
        "limited": make_prompt_cache(model(), max_kv_size=32, calibration=measured()),
        "empty": make_prompt_cache(model()),
    }
    made |= {name: make_prompt_cache(model(name)) for name in TINY}
    lengths = {"plain": [40], "centred": [33], "limited": [30, 30], "windows": [60, 1]}
    for name in made.keys() - {"empty"}:
        for length in lengths.get(name, [33, 1]):
            mx.eval(model(_kind(name))(models.tokens(length), cache=made[name]))
    files = {}
    for name, prompt_cache in made.items():
        save_prompt_cache(
            _file("good.safetensors"), prompt_cache, model(_kind(name)), {"note": name}
        )
        files[name] = _file("good.safetensors").read_bytes()
    return files


def sealed(data: bytes) -> bytes:
    """The file under a checksum that holds, where it has a place for one."""
    blank = re.sub(rb'("checksum"\s*:\s*")[0-9a-f]{64}"', rb"\g<1>" + BLANK + b'"', data)
    return blank.replace(BLANK, hashlib.sha256(blank).hexdigest().encode(), 1)


@st.composite
def other_forms(draw, records: list) -> list:
    """Records of layers in lists of one, in lists of lists, out of lists, and of other classes."""
    records = deepcopy(records)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(records) - 1))
        record = records[at]
        inside = record.get("parts", [record])
        match draw(st.sampled_from(["wrap", "wrap", "unwrap", "order", "class", "class"])):
            case "wrap":
                others = draw(st.lists(st.sampled_from(inside), max_size=2))
                records[at] = {"class": "CacheList", "parts": [record, *others]}
            case "unwrap":
                records[at] = draw(st.sampled_from(inside))
            case "order" if "parts" in record:
                record["parts"] = draw(st.permutations(inside))
            case _:
                draw(st.sampled_from([record, *inside]))["class"] = draw(st.sampled_from(CLASSES))
    return records


@st.composite
def other_versions(draw, file: File, name: str) -> File:
    """The file with a cache's header of state version 3, or with other sizes and windows in it."""
    dtype, _, data = file.arrays[name]
    values = [*struct.unpack(f"<{len(data) // 4}i", data)]
    if draw(st.booleans()):
        values[0] = 3
        del values[V_HEAD_DIM], values[WINDOW]
    else:
        places = st.sampled_from([HEAD_DIM, WINDOW, WINDOW, CENTRED, V_HEAD_DIM, V_HEAD_DIM])
        sizes = st.sampled_from([-1, 0, 1, 2, 4, 7, 8, 16, 19, 20, 21, 32, 64, 4096, 2**31 - 1])
        for _ in range(draw(st.integers(1, 2))):
            values[draw(places)] = draw(sizes)
    file.arrays[name] = [dtype, [len(values)], struct.pack(f"<{len(values)}i", *values)]
    return file


@st.composite
def forged_prompt_caches(draw) -> tuple[str, bytes]:
    """The name of a good file, and a bad one made of it."""
    name = draw(st.sampled_from(sorted(prompt_caches())))
    good = prompt_caches()[name]
    file = File(good)
    match draw(
        st.sampled_from(["blind", "header", "metadata", "splice"])
        | st.sampled_from(["numbers", "versions", "arrays", "layers", "forms"])
    ):
        case "blind":
            data = draw(damaged(good))
        case "numbers":
            file = draw(other_integers(file, draw(st.sampled_from(_headers(file)))))
            data = written(file.header(), file.data)
        case "versions":
            for header in _headers(file):
                if draw(st.booleans()):
                    file = draw(other_versions(file, header))
            data = written(file.header(), file.data)
        case "arrays":
            file = draw(other_arrays(file))
            data = written(file.header(), file.data)
        case "layers":
            records = json.loads(file.metadata["layers"])
            names = st.sampled_from(CLASSES) | st.sampled_from(sorted(file.arrays))
            file.metadata["layers"] = json.dumps(draw(mutated(records, json_values | names)))
            data = written(file.header(), file.data)
        case "forms":
            records = json.loads(file.metadata["layers"])
            file.metadata["layers"] = json.dumps(draw(other_forms(records)))
            data = written(file.header(), file.data)
        case "metadata":
            file.metadata = draw(mutated(file.metadata))
            data = written(file.header(), file.data)
        case "header":
            data = written(draw(hostile_headers(file.header())), file.data)
        case "splice":
            other = File(prompt_caches()[draw(st.sampled_from(sorted(prompt_caches())))])
            data = written(file.header(), other.data)
    return name, sealed(data) if draw(st.integers(0, 9)) else data


def _headers(file: File) -> list[str]:
    """The arrays that are caches' own headers."""
    return [name for name, (dtype, _, _) in file.arrays.items() if dtype == "I32"]


def check_prompt_cache(case: tuple[str, bytes]) -> str:
    name, data = case
    of = model(_kind(name))
    file = _file("case.safetensors")
    file.write_bytes(data)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    try:
        loaded, metadata = load_prompt_cache(file, of, return_metadata=True)
    except Exception as error:
        return refusal(error)
    finally:
        bounded(before, len(data))
    if classes(loaded) != classes(make_prompt_cache(of)):
        raise Finding(f"caches {classes(loaded)} are none of the model's")
    if not all(isinstance(x, str) for pair in metadata.items() for x in pair):
        raise Finding(f"metadata {metadata} are no strings")
    usable(loaded)
    if not stepped(of, loaded, 1):
        return "loaded, refuses tokens"
    return "the same" if data == prompt_caches()[name] else "loaded, safe to use"


def classes(prompt_cache) -> list:
    return [(type(layer), *map(type, parts(layer))) for layer in prompt_cache]


def stepped(of, prompt_cache, count: int) -> bool:
    """Take some steps. False: a centre that was forged makes vectors too long to be stored."""
    try:
        mx.eval(of(models.tokens(count), cache=prompt_cache))
        mx.eval(of(models.tokens(1), cache=prompt_cache))
    except ValueError as error:
        if "cannot encode" not in str(error):
            raise
        return False
    return True


def usable(loaded) -> None:
    for layer in all_compressed(loaded):
        some, pages = layer.sequences, layer.pool.pages
        blocks = some.tables[0].blocks
        if not all(0 <= block < pages.shape[0] for block in blocks):
            raise Finding(f"blocks {blocks} of {pages.shape[0]}")
        scales = layer.layout.split(pages)[-1].view(mx.float16)
        if not mx.isfinite(scales).all().item():
            raise Finding("scales that are not finite")


def bounded(before: int, size: int) -> None:
    """Whether MLX held no more at any time than a file's size explains."""
    if (peak := mx.get_peak_memory() - before) > 8 * size + (4 << 20):
        raise Finding(f"a file of {size} bytes took {peak} bytes")


@cache
def calibrations() -> bytes:
    config = TurboQuantConfig.from_names(layers="0=tq8")
    calibration.Calibration(measured().centres, measured().fingerprint, config).save(
        _file("calibration.safetensors")
    )
    return _file("calibration.safetensors").read_bytes()


@st.composite
def forged_calibrations(draw) -> bytes:
    good = calibrations()
    file = File(good)
    match draw(st.sampled_from(["blind", "arrays", "arrays", "metadata", "values", "header"])):
        case "blind":
            return draw(damaged(good))
        case "arrays":
            file = draw(other_arrays(file))
        case "metadata":
            file.metadata = draw(mutated(file.metadata))
        case "values":
            key = draw(st.sampled_from(["layers", "widths"]))
            counts = st.sampled_from(
                ["-1", "0", "1", "3", "9" * 12, "1_0", "²", "0=bf16", "9-8=tq4"]
            )
            file.metadata[key] = draw(counts | st.text(max_size=8))
        case "header":
            return written(draw(hostile_headers(file.header())), file.data)
    return written(file.header(), file.data)


def check_calibration(data: bytes) -> str:
    file = _file("case.safetensors")
    file.write_bytes(data)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    try:
        loaded = calibration.load(file, model())
        bounded(before, len(data))
        prompt_cache = make_prompt_cache(model(), calibration=loaded)
    except Exception as error:
        return refusal(error)
    if not stepped(model(), prompt_cache, 20):
        return "loaded, refuses tokens"
    return "the same" if data == calibrations() else "loaded, safe to use"


TARGETS = [
    Target("prompt caches", 4000, forged_prompt_caches(), check_prompt_cache),
    Target("calibrations", 2500, forged_calibrations(), check_calibration),
]
