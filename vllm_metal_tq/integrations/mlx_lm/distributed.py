"""Several processes that hold one model together, over ``mx.distributed``.

mlx_lm divides the model: into shares of every layer's heads (tensor parallelism) or into stages of
some layers each (a pipeline). All processes then do the same in step: whoever takes another
decision than the others leaves them waiting. Whatever a decision is made of is therefore the same
in all, or is agreed on here. In a process that is alone, nothing here does anything.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream

from ...calibration import fingerprint
from ...part import Part
from . import hook
from .probe import plain_attention

Sampler = Callable[[mx.array], mx.array]


def rank() -> int:
    """The number of this process; 0 is the one that speaks to the user."""
    return mx.distributed.init().rank()


def size() -> int:
    """How many processes there are."""
    return mx.distributed.init().size()


def shard(model: nn.Module, pipeline: bool = False) -> None:
    """Leave of a model the part of this process. All processes call it.

    Weights that were loaded lazily are still not read: only those of the part ever are, but for
    the few that the fingerprint looks at.

    Args:
        model: the whole model, as mlx_lm has loaded it.
        pipeline: whether to divide the layers, not the heads of each.

    Raises:
        ValueError: mlx_lm, or the number of heads or layers, does not allow it.
    """
    if size() == 1:
        return
    hook.install(model)
    shapes = plain_attention(model)
    whole, kind = fingerprint(model), type(model).__module__.rpartition(".")[2]
    if pipeline:
        stages: Any = getattr(model, "model", None)
        if not hasattr(stages, "pipeline"):
            raise ValueError(f"mlx_lm runs no {kind} model as a pipeline: try without --pipeline")
        if len(shapes) < size():
            raise ValueError(f"{size()} processes are too many for a pipeline of {len(shapes)}")
        stages.pipeline(mx.distributed.init())
        start, end = stages.start_idx, min(stages.end_idx, len(shapes))
        if mx.distributed.all_sum(end - start).item() != len(shapes):  # mlx_lm before 0.32
            raise ValueError(
                f"this mlx_lm does not divide {len(shapes)} layers among {size()} processes: take "
                "a newer one, or a number that divides them evenly"
            )
        part = Part(end - start, start, len(shapes), fingerprint=whole)
    else:
        if not hasattr(model, "shard"):
            raise ValueError(f"mlx_lm does not divide the heads of {kind} models: try --pipeline")
        _check_heads({shape[1] for shape in shapes if shape})
        model.shard()
        part = Part(len(shapes), 0, len(shapes), rank(), size(), whole)
    part.remember(model)


def _check_heads(counts: set[int]) -> None:
    common = math.gcd(*counts)
    if common % size():
        allowed = [n for n in range(1, common + 1) if common % n == 0]
        raise ValueError(
            f"{size()} processes cannot share {', '.join(map(str, sorted(counts)))} KV heads "
            f"evenly: allowed are {', '.join(map(str, allowed))}"
        )


def most(number: int) -> int:
    """The largest of the numbers that all processes name."""
    if size() == 1:
        return number
    return cast(int, mx.distributed.all_max(mx.array(number, mx.int64)).item())


def least(number: int | None) -> int | None:
    """The smallest of the numbers that all processes name; None is no limit."""
    unlimited = 2**62
    found = -most(-unlimited if number is None else -number)
    return None if found == unlimited else found


def finish() -> None:
    """Wait until all processes have come here, with nothing under way.

    mlx_lm's generation has begun one more step when it ends, which waits for the others. And MLX
    keeps no order between what two streams send, so that this belongs between generating and
    running the model otherwise, too.
    """
    if size() > 1:
        with mx.stream(generation_stream):  # of a class that synchronize() may not take
            mx.synchronize()
        mx.synchronize()
        most(0)


def gather(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """What each process has, in their order."""
    if size() == 1:
        return [dict(arrays)]
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # its own keyword is another type
    mine = np.frombuffer(file.getvalue(), np.uint8)
    padded = np.zeros(most(len(mine)), np.uint8)
    padded[: len(mine)] = mine
    lengths = mx.distributed.all_gather(mx.array([len(mine)], mx.int64))
    everything = np.array(mx.distributed.all_gather(mx.array(padded)[None]))
    parts = zip(everything, cast(list[int], lengths.tolist()), strict=True)
    return [dict(np.load(io.BytesIO(part[:n].tobytes()), allow_pickle=False)) for part, n in parts]


@lru_cache(maxsize=256)  # mlx_lm samples for a batch in one call where its samplers are one
def same(sampler: Sampler) -> Sampler:
    """``sampler`` with what it chooses in the first process, in all of them.

    The logits are the same up to roundings, which are not those of another kind of GPU: that is
    enough for two processes to go different ways.
    """
    if size() == 1:
        return sampler
    first = rank() == 0

    def sample(logprobs: mx.array) -> mx.array:
        chosen = sampler(logprobs)
        # Zeros that come of the logits: the sum must not be begun before what the model sends.
        return mx.distributed.all_sum(chosen if first else chosen * 0)

    return sample
