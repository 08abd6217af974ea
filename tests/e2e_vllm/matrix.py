"""What becomes of each kind of attention with vLLM: found by serving a tiny model of it."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as host
import models
import test_matrix
from engine import Engine
from kinds import Kind
from test_matrix import BOUND, CHUNKS, STEPS
from trained import trained

ON = {"turboquant": True, "preset": "tq8", "calibration": False}
SAME = 0.02  # spreads: linear attention of mlx_lm and of the stand-in round differently
OTHER = "its uncompressed logits are not mlx_lm's"


@dataclass(frozen=True)
class Outcome:
    """What became of a kind of attention.

    Attributes:
        compressed: layers with pages of ours.
        layers: all.
        theirs: why vllm-metal does not serve it without the plugin, where it does not.
        refused: why the plugin does not, where it does not.
        logits: ``(1 + STEPS, vocab)`` with pages, or None.
        uncompressed: the same with vllm-metal's cache, or None.
    """

    layers: int
    compressed: int = 0
    theirs: str = ""
    refused: str = ""
    logits: mx.array | None = None
    uncompressed: mx.array | None = None

    @property
    def moved(self) -> mx.array:
        """How far each step's logits are from the uncompressed ones, in spreads."""
        spread = mx.std(self.uncompressed, axis=1, keepdims=True)
        return (mx.abs(self.logits - self.uncompressed) / spread).max(axis=1)

    @property
    def choices(self) -> tuple[int, int]:
        """Steps whose first choice leads by more than ``BOUND``, and those that keep it."""
        best = mx.sort(self.uncompressed, axis=1)[:, -2:]
        lead = (best[:, 1] - best[:, 0]) / mx.std(self.uncompressed, axis=1)
        same = self.logits.argmax(axis=1) == self.uncompressed.argmax(axis=1)
        clear = lead > BOUND
        return int(clear.sum()), int((clear & same).sum())


def outcome(kind: Kind) -> Outcome:
    """Serve a model of a kind three times: by mlx_lm, by vllm-metal, and with the plugin."""
    model = trained(kind)
    count = len(model.layers)
    exact, forced = test_matrix.decode(model, host.make_prompt_cache(model))
    try:
        _, theirs = serve(kind, forced, {})
    except Exception as error:  # whatever a model that it does not know may raise
        return Outcome(count, theirs=reason(error))
    spread = mx.std(exact, axis=1, keepdims=True)
    if (mx.abs(theirs - exact) / spread).max() > SAME:
        return Outcome(count, theirs=OTHER)
    try:
        engine, ours = serve(kind, forced, ON)
    except NotImplementedError as error:  # all that the plugin refuses a model with
        return Outcome(count, refused=reason(error), uncompressed=theirs)
    layers = engine.worker.model_runner.paged_attention_runtime.kv_cache.layers
    compressed = sum(layer is not None for layer in layers)
    return Outcome(count, compressed, logits=ours, uncompressed=theirs)


def serve(kind: Kind, forced: list[int], additional: dict) -> tuple[Engine, mx.array]:
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(trained(kind), Path(folder), CHUNKS[0], additional)
    prompt = models.tokens(sum(CHUNKS))[0].tolist()
    return engine, engine.decode(prompt, 1 + STEPS, forced)


def reason(error: Exception) -> str:
    """What comes before the first colon or semicolon of a message, without the model's folder."""
    text = re.sub(r"(?<!\S)/\S+", "the model", str(error)).removeprefix("turboquant: ")
    first = re.split(r"[;:]\s|\n", text)[0].rstrip(".")
    return first if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {first}"
