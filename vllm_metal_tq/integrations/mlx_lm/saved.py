"""Prompt caches in files: safetensors, of a format of their own.

mlx_lm's format changed between 0.31 and 0.32; this one is the same for both. The metadata says
what a file is and for which model; a checksum covers every byte of it, header included, and is
verified before anything is parsed, so that a damaged file is never half believed.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
import numpy as np

from ... import safetensors
from ...calibration import named_weights
from ...types import PromptCache
from . import hook
from .cache import TurboQuantKVCache
from .parts import compressed, keys_of, parts
from .pools import CLASSES
from .probe import Attention, alone, attention

_FORMAT = "vllm-metal-tq prompt cache"
_VERSION = "1"
_BLANK = "0" * 64  # stands for the checksum while it is computed
_CHECKSUM = re.compile(rb'"checksum"\s*:\s*"([0-9a-f]{64})"')
_MAX_HEADER = 100_000_000  # bytes, as safetensors limits it
_SAMPLES = 64  # elements of each weight that the fingerprint looks at
Record = dict[str, Any]
"""What the header of a file says of one layer, as JSON takes it."""
Classes = tuple[bool, list[str]]
"""Whether a layer has a list of caches, and the names of their classes."""

_ANEW = "make it anew with `vllm-metal-tq cache-prompt` or save_prompt_cache"


def save_prompt_cache(
    file_name: str | Path,
    prompt_cache: PromptCache,
    model: nn.Module,
    metadata: dict[str, str] | None = None,
) -> None:
    """Save a prompt cache; what it replaces stays whole until the new file is complete.

    Args:
        file_name: must end in ``.safetensors``.
        prompt_cache: what ``make_prompt_cache(model)`` made.
        model: the model that filled it. Its fingerprint goes into the file.
        metadata: strings to keep with it.

    Raises:
        ValueError: the name is unfit, the cache is of another model, or ``metadata`` are no
            strings.
        OSError: the file cannot be written.
    """
    file = check_target(file_name)
    hook.install(model)
    if not _of_model(prompt_cache, model):
        raise ValueError(f"{_name(file)} is not saved: the cache was made for another model")
    if (several := max(map(_sequences, prompt_cache), default=1)) > 1:
        raise ValueError(
            f"{_name(file)} is not saved: the cache holds {several} sequences: save one, "
            "`[layer.extract(i) for layer in prompt_cache]`"
        )
    _check_metadata(metadata or {})
    arrays: dict[str, mx.array] = {}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "checksum": _BLANK,
        "model": model_fingerprint(model),
        "calibration": _calibration_fingerprint(prompt_cache),
        "mlx_lm": _mlx_lm(),
        "layers": json.dumps([_record(c, str(i), arrays) for i, c in enumerate(prompt_cache)]),
        "metadata": json.dumps(metadata or {}),
    }
    safetensors.write(file, "the prompt cache", arrays, header, _seal)


def check_target(file_name: str | Path) -> Path:
    """The path of a file to save to.

    Raises:
        ValueError: the name does not end in ``.safetensors``, or is a folder's.
        FileNotFoundError: the folder is not there.
    """
    file = Path(file_name)
    if file.suffix != ".safetensors":
        raise ValueError(f"{_name(file)}: the name must end in .safetensors")
    if file.is_dir():
        raise ValueError(f"{_name(file)} is a folder: name a file")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{_name(file)}: there is no folder {str(file.parent)!r}")
    return file


@overload
def load_prompt_cache(
    file_name: str | Path, model: nn.Module, return_metadata: Literal[False] = False
) -> PromptCache: ...


@overload
def load_prompt_cache(
    file_name: str | Path, model: nn.Module, return_metadata: Literal[True]
) -> tuple[PromptCache, dict[str, str]]: ...


def load_prompt_cache(
    file_name: str | Path, model: nn.Module, return_metadata: bool = False
) -> PromptCache | tuple[PromptCache, dict[str, str]]:
    """Load what ``save_prompt_cache`` wrote, for use with ``model``.

    The cache brings the widths and the centres with which it was made, whatever calibration the
    model has now.

    Args:
        file_name: the file.
        model: the model that filled the cache, loaded anew or not.
        return_metadata: return its metadata, too.

    Returns:
        The prompt cache, or with ``return_metadata`` a tuple of it and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no prompt cache, is of another version or model, or
            holds caches of another mlx_lm's.
    """
    file = Path(file_name)
    if not file.exists():
        raise FileNotFoundError(f"{_name(file)}: no such file")
    if file.is_dir():
        raise ValueError(f"{_name(file)} is a folder: name a file")
    if not file.is_file():  # a pipe may never end
        raise ValueError(f"{_name(file)} is no regular file")
    _check_seal(file)
    hook.install(model)
    try:
        arrays, header = safetensors.read(file)
        _check_header(file, header, model)
        records, metadata = json.loads(header["layers"]), json.loads(header["metadata"])
        _check_metadata(metadata)
        _check_classes(file, header, records)
        if not _structured(records, model):
            raise _UnfitError(_of_another(file))
        made = hook.host_caches(model)
        prompt_cache = [_rebuilt(record, made, i, arrays) for i, record in enumerate(records)]
        _check_states(prompt_cache, model)
        calibration = header["calibration"]
    except _UnfitError as error:
        raise ValueError(str(error)) from None
    # RuntimeError is MLX's, and of JSON that is too deep.
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{_name(file)} contradicts itself: {reason}; {_ANEW}") from error
    if not _of_model(prompt_cache, model):
        raise ValueError(_of_another(file))
    if calibration != _calibration_fingerprint(prompt_cache):
        raise ValueError(f"{_name(file)} contradicts itself: other centres; {_ANEW}")
    return (prompt_cache, metadata) if return_metadata else prompt_cache


def model_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits that tell models apart: shapes, types, RoPE and some of each weight.

    A prompt cache is wrong for a model that differs in any weight, so that this looks at every
    one, where a calibration's fingerprint may be content with a few.
    """
    weights = named_weights(model)
    shapes = [(name, x.shape, str(x.dtype)) for name, x in weights]
    digest = hashlib.sha256(repr([shapes, _rope_settings(getattr(model, "args", None))]).encode())
    samples = [_bits(x.reshape(-1)[:: max(x.size // _SAMPLES, 1)][:_SAMPLES]) for _, x in weights]
    mx.eval(samples)
    for sample in samples:
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()[:32]


def _bits(x: mx.array) -> mx.array:
    return x.view(mx.uint8) if x.size else x.astype(mx.uint8)


def _rope_settings(settings: object) -> list[tuple[str, str]]:
    """What a model's arguments say of RoPE: keys differ with it although no weight does."""
    fields = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    found = []
    for name, value in sorted(fields.items(), key=lambda item: str(item[0])):
        if value is not None and ("rope" in str(name) or "rotary" in str(name)):
            found.append((str(name), repr(value)))
        elif isinstance(value, dict) or hasattr(value, "__dict__"):
            found += _rope_settings(value)
    return found


def _calibration_fingerprint(prompt_cache: PromptCache) -> str:
    """32 hexadecimal digits of the centres that the layers were encoded with."""
    digest = hashlib.sha256()
    for layer, cache in enumerate(map(compressed, prompt_cache)):
        centre = cache.sequences.centre if cache else None
        for array in centre.arrays if centre else ():
            digest.update(f"{layer} {array.shape}".encode() + np.array(array).tobytes())
    return digest.hexdigest()[:32]


def _of_model(prompt_cache: PromptCache, model: nn.Module) -> bool:
    """Whether exactly those layers are compressed that can be, as they would be for the model."""
    layers = attention(model)
    return len(prompt_cache) == len(layers) and all(
        map(_serves, map(compressed, prompt_cache), layers)
    )


def _serves(cache: TurboQuantKVCache | None, layer: Attention | str) -> bool:
    if cache is None or isinstance(layer, str):
        return cache is None and isinstance(layer, str)
    dims = cache.layout.head_dim, cache.layout.v_head_dim
    served = Attention(*dims, cache.pool.num_kv_heads, layer.reader, cache.sequences.window)
    return isinstance(cache, CLASSES[layer.reader]) and served == layer


def _structured(records: list[Record], model: nn.Module) -> bool:
    """Whether each layer has the caches that one made for the model has, limited or not."""
    layers = attention(model)
    made = [hook.host_caches(model, limit) for limit in (None, 1)]
    expected = [list(map(_expected, caches, layers)) for caches in made]
    given = list(map(_classes, records))
    return len(given) == len(layers) and all(
        form in forms for form, *forms in zip(given, *expected, strict=True)
    )


def _classes(record: Record) -> Classes:
    listed = record["class"] == host.CacheList.__name__
    return listed, [part["class"] for part in (record["parts"] if listed else [record])]


def _expected(own: Any, layer: Attention | str) -> Classes:
    ours = None if isinstance(layer, str) else CLASSES[layer.reader]
    replaced = None if ours is None else keys_of(own)
    every = [ours if ours and part is replaced else type(part) for part in parts(own)]
    return isinstance(own, host.CacheList), [cls.__name__ for cls in every]


def _check_states(prompt_cache: PromptCache, model: nn.Module) -> None:
    """Whether states without keys are of the shapes that the model makes; they do not grow.

    Raises:
        ValueError: one is not.
    """
    own = hook.host_caches(model)
    if not any(isinstance(part, host.ArraysCache) for cache in own for part in parts(cache)):
        return
    with alone(model):  # the graph of one token, which is never evaluated
        model(mx.zeros((1, 1), mx.int32), cache=own)
    for layer, (cache, fresh) in enumerate(zip(prompt_cache, own, strict=True)):
        for given, made in zip(parts(cache), parts(fresh), strict=True):
            if isinstance(made, host.ArraysCache) and not _alike(given, made):
                raise ValueError(f"layer {layer} has a state that is none of the model's")


def _alike(given: Any, made: Any) -> bool:
    padding = [getattr(given, name, None) for name in ("left_padding", "lengths")]
    return (
        all(x is None for x in padding)  # of one sequence
        and isinstance(given.cache, list)
        and len(given.cache) == len(made.cache)
        and all(x is None or _fits(x, y) for x, y in zip(given.cache, made.cache, strict=True))
    )


def _fits(given: object, made: mx.array | None) -> bool:
    return (
        isinstance(given, mx.array)
        and made is not None
        and given.shape == made.shape
        and mx.issubdtype(given.dtype, mx.floating) == mx.issubdtype(made.dtype, mx.floating)
    )


def _sequences(cache: object) -> int:
    ours = compressed(cache)
    return len(ours.sequences) if ours else 1


def _record(cache: Any, name: str, arrays: dict[str, mx.array]) -> Record:
    """What the header says of one layer; its arrays join ``arrays``."""
    if isinstance(cache, TurboQuantKVCache):
        one = cache.extract(0)  # which a batch of one has
        state = _packed(one.compacted().state, name, arrays)
        return {"class": type(one).__name__, "config": _widths(cache), "state": state}
    if isinstance(cache, host.CacheList):
        several = [_record(part, f"{name}.{i}", arrays) for i, part in enumerate(parts(cache))]
        return {"class": host.CacheList.__name__, "parts": several}
    record: Record = {"class": type(cache).__name__}
    # mlx_lm before 0.32 keeps numbers apart from arrays, and has no state for an empty cache.
    if hasattr(cache, "meta_state"):
        record["meta_state"] = cache.meta_state
    state = None if cache.empty() else _packed(cache.state, name, arrays)
    return record | {"state": state}


def _widths(cache: TurboQuantKVCache) -> list[int]:
    config = cache.layout.config
    return [config.k_width, config.v_width, config.block_size]


def _packed(value: object, name: str, arrays: dict[str, mx.array]) -> object:
    """A state as JSON takes it: arrays become names, or shapes where they are empty."""
    if isinstance(value, mx.array):
        if not value.size:  # cannot be saved
            return {"shape": value.shape, "dtype": str(value.dtype).removeprefix("mlx.core.")}
        arrays[name] = value
        return {"array": name}
    if isinstance(value, (list, tuple)):
        return [_packed(x, f"{name}.{i}", arrays) for i, x in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a cache's state holds {type(value).__name__}, which cannot be saved")


def _unpacked(value: object, arrays: dict[str, mx.array]) -> Any:
    if isinstance(value, list):
        return [_unpacked(x, arrays) for x in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    shape = value["shape"]
    if 0 not in shape or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise ValueError(f"an empty array has shape {shape}")
    return mx.zeros(shape, getattr(mx, value["dtype"]))


def _rebuilt(record: Record, made: PromptCache, layer: int, arrays: dict[str, mx.array]) -> Any:
    """The cache of one layer."""
    if record["class"] == host.CacheList.__name__:
        own = list(parts(made[layer]))
        several = enumerate(record["parts"])
        return host.CacheList(*(_rebuilt(part, own, i, arrays) for i, part in several))
    state = _unpacked(record["state"], arrays)
    if record["class"] in hook.CACHES:
        cache = hook.CACHES[record["class"]].from_state(state)
        if _widths(cache) != record["config"]:
            raise ValueError(f"layer {layer} has other widths than its header says")
        return cache
    cls = _host_class(record["class"], made)
    meta_state = [record["meta_state"]] if "meta_state" in record else []
    if state is not None:
        return cls.from_state(state, *meta_state)
    cache = made[layer]
    if type(cache) is not cls:
        raise ValueError(f"layer {layer} is an empty {record['class']}")
    for meta in meta_state:
        cache.meta_state = meta
    return cache


def _host_class(name: str, made: PromptCache) -> Any:
    """A cache class of mlx_lm's or of the model's own, and nothing else that goes by the name."""
    classes = {type(cache).__name__: type(cache) for cache in made}
    cls = classes.get(name) or getattr(host, name)
    if not (isinstance(cls, type) and issubclass(cls, host._BaseCache)):
        raise ValueError(f"{name} is no cache")
    return cls


def _of_another(file: Path) -> str:
    return (
        f"{_name(file)} was made by another model, or by a release that compressed other layers; "
        f"{_ANEW}"
    )


class _UnfitError(Exception):
    """A whole file that is not for us; the message says all."""


def _check_header(file: Path, header: dict[str, str], model: nn.Module) -> None:
    if header.get("format") != _FORMAT:
        raise _UnfitError(f"{_name(file)} is no {_FORMAT}; {_ANEW}")
    if header.get("version") != _VERSION:
        raise _UnfitError(
            f"{_name(file)} has version {header.get('version')}: {_VERSION} can be read; {_ANEW}"
        )
    if header["model"] != model_fingerprint(model):
        raise _UnfitError(
            f"{_name(file)} was made by another model: load it with that one, or make one for "
            "this model with `vllm-metal-tq cache-prompt`"
        )


def _check_metadata(metadata: object) -> None:
    pairs = metadata.items() if isinstance(metadata, dict) else [(None, None)]
    if not all(isinstance(x, str) for pair in pairs for x in pair):
        raise ValueError(f"metadata {metadata!r} must be strings by their names")


def _check_classes(file: Path, header: dict[str, str], records: list[Record]) -> None:
    """Our state is the same under every mlx_lm, the state of its own caches is not."""
    every = [part for record in records for part in record.get("parts", [record])]
    others = {record["class"] for record in every} - set(hook.CACHES)
    if others and header["mlx_lm"] != _mlx_lm():
        raise _UnfitError(
            f"{_name(file)} holds {', '.join(sorted(others))} of mlx_lm {header['mlx_lm']}, which "
            f"{_mlx_lm()} does not read; {_ANEW}"
        )


def _mlx_lm() -> str:
    """The release, without its last number: what the state of mlx_lm's own caches depends on."""
    return ".".join(version("mlx-lm").split(".")[:2])


def _seal(stream: BinaryIO) -> None:
    """Put the checksum into its place."""
    place, _, checksum = _checksums(stream)
    stream.seek(place)
    stream.write(checksum)


def _check_seal(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            _, said, checksum = _checksums(stream)
    except ValueError:
        raise ValueError(f"{_name(file)} is damaged, or no {_FORMAT}; {_ANEW}") from None
    if said != checksum:
        raise ValueError(f"{_name(file)} is damaged: its checksum does not fit; {_ANEW}")


def _checksums(stream: BinaryIO) -> tuple[int, bytes, bytes]:
    """Where the checksum of a file stands, what it says, and what it should say.

    It is SHA-256 of all bytes, with zeros in its own place. Every version keeps it like this.

    Raises:
        ValueError: there is no place for it.
    """
    stream.seek(0)
    size = stream.read(8)
    header = stream.read(min(int.from_bytes(size, "little"), _MAX_HEADER))
    found = list(_CHECKSUM.finditer(header))
    if len(found) != 1:
        raise ValueError("no checksum")
    start, end = found[0].span(1)
    digest = hashlib.sha256(size + header[:start] + _BLANK.encode() + header[end:])
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return len(size) + start, found[0][1], digest.hexdigest().encode()


def _name(file: Path) -> str:
    return f"prompt cache {str(file)!r}"
