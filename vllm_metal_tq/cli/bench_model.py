"""What ``bench context`` and ``bench serve`` learn of a model first, in a process of its own."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from dataclasses import dataclass

from . import common


@dataclass(frozen=True)
class Facts:
    """A model, and the machine that it runs on.

    Attributes:
        weight_bytes: of all parameters, as they are in memory.
        limit: tokens that it was made for, None where its config does not say.
        kv_dtype: of keys and values in mlx_lm's cache, which is not bfloat16 for every model.
        machine: the device, the system and versions, and whether kernels run.
    """

    weight_bytes: int
    limit: int | None
    kv_dtype: str
    machine: dict[str, str]

    def label(self, cache: str) -> str:
        """The cache's name; the dense one is named after its dtype where that is not bfloat16."""
        from ..bench.caches import DENSE

        dense = cache == DENSE and self.kv_dtype != "bfloat16"
        return f"dense {self.kv_dtype}" if dense else cache


def facts(args: argparse.Namespace) -> Facts:
    """Load the model of ``--model``, and calibrate it where that is still to be done.

    All later processes find the calibration, so that none of their memory goes into making one.

    Raises:
        ValueError: it cannot be loaded, or the calibration not be used.
    """
    from ..bench.process import apart, outcome

    found = outcome(apart(_examine, args))
    assert isinstance(found, Facts)
    return found


def _examine(args: argparse.Namespace) -> Generator[None, None, Facts]:
    yield from ()
    from ..bench import clock, context

    model, tokenizer = common.load_model(args.model)
    common.calibration_for(args, model, tokenizer)
    return Facts(
        context.weight_bytes(model),
        context.model_limit(model),
        context.kv_dtype(model),
        clock.machine() | clock.software() | {"runs": clock.runs()},
    )
