"""Prompt caches and calibrations that were damaged, or forged under a checksum that holds."""

import hashlib
import json
import re
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import models
from harness import Finding, Target, refusal
from hypothesis import strategies as st
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
    TurboQuantKVCache,
    calibration,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from vllm_metal_tq.integrations.mlx_lm import calibrate

BLANK = b"0" * 64


@cache
def _folder():
    return tempfile.TemporaryDirectory()  # kept as long as the process


def _file(name: str) -> Path:
    return Path(_folder().name) / name


@cache
def model():
    heads = {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    return models.llama(num_hidden_layers=2, hidden_size=16, **heads)


@cache
def measured():
    return calibrate(model(), models.tokens(100)[0].tolist())


@cache
def prompt_caches() -> dict[str, bytes]:
    """Good files by what is special about them."""
    made = {
        "plain": make_prompt_cache(model(), TurboQuantConfig(2, 2)),
        "centred": make_prompt_cache(model(), TurboQuantConfig(4, 3, 32), calibration=measured()),
        "limited": make_prompt_cache(model(), max_kv_size=32, calibration=measured()),
        "empty": make_prompt_cache(model()),
    }
    for name, lengths in {"plain": [40], "centred": [33], "limited": [30, 30]}.items():
        for length in lengths:
            model()(models.tokens(length), cache=made[name])
    files = {}
    for name, prompt_cache in made.items():
        save_prompt_cache(_file("good.safetensors"), prompt_cache, model(), {"note": name})
        files[name] = _file("good.safetensors").read_bytes()
    return files


def sealed(data: bytes) -> bytes:
    """The file under a checksum that holds, where it has a place for one."""
    blank = re.sub(rb'("checksum"\s*:\s*")[0-9a-f]{64}"', rb"\g<1>" + BLANK + b'"', data)
    return blank.replace(BLANK, hashlib.sha256(blank).hexdigest().encode(), 1)


@st.composite
def forged_prompt_caches(draw) -> tuple[str, bytes]:
    """The name of a good file, and a bad one made of it."""
    name = draw(st.sampled_from(sorted(prompt_caches())))
    good = prompt_caches()[name]
    file = File(good)
    match draw(
        st.sampled_from(["blind", "header", "metadata", "splice"])
        | st.sampled_from(["numbers", "arrays", "layers"])
    ):
        case "blind":
            data = draw(damaged(good))
        case "numbers":
            integers = [n for n, (dtype, _, _) in file.arrays.items() if dtype == "I32"]
            file = draw(other_integers(file, draw(st.sampled_from(integers))))
            data = written(file.header(), file.data)
        case "arrays":
            file = draw(other_arrays(file))
            data = written(file.header(), file.data)
        case "layers":
            records = json.loads(file.metadata["layers"])
            classes = st.sampled_from(["KVCache", "CacheList", "ArraysCache", "TurboQuantKVCache"])
            file.metadata["layers"] = json.dumps(draw(mutated(records, json_values | classes)))
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


def check_prompt_cache(case: tuple[str, bytes]) -> str:
    name, data = case
    file = _file("case.safetensors")
    file.write_bytes(data)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    try:
        loaded, metadata = load_prompt_cache(file, model(), return_metadata=True)
    except Exception as error:
        return refusal(error)
    finally:
        bounded(before, len(data))
    if any(not isinstance(layer, TurboQuantKVCache) for layer in loaded):
        raise Finding("a layer is not compressed")
    if not all(isinstance(x, str) for pair in metadata.items() for x in pair):
        raise Finding(f"metadata {metadata} are no strings")
    usable(loaded)
    if not stepped(loaded, 1):
        return "loaded, refuses tokens"
    return "the same" if data == prompt_caches()[name] else "loaded, safe to use"


def stepped(prompt_cache, count: int) -> bool:
    """Take some steps. False: a centre that was forged makes vectors too long to be stored."""
    try:
        mx.eval(model()(models.tokens(count), cache=prompt_cache))
        mx.eval(model()(models.tokens(1), cache=prompt_cache))
    except ValueError as error:
        if "cannot encode" not in str(error):
            raise
        return False
    return True


def usable(loaded) -> None:
    for layer in loaded:
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
    if not stepped(prompt_cache, 20):
        return "loaded, refuses tokens"
    return "the same" if data == calibrations() else "loaded, safe to use"


TARGETS = [
    Target("prompt caches", 4000, forged_prompt_caches(), check_prompt_cache),
    Target("calibrations", 2500, forged_calibrations(), check_calibration),
]
