"""The plan: for each way to store keys and values, what fits into a budget and how fast it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import PRESETS, TurboQuantConfig
from .caches import ENGINES, Cache, Scheme, Unsupported
from .fields import MOST
from .layers import Model
from .machine import GIB, Machine

CONTEXT = 4096  # tokens of a sequence, where concurrency is asked for without a context
BASELINES = (Scheme("bf16"), Scheme("mlx_lm 8-bit", mlx_bits=8), Scheme("mlx_lm 4-bit", mlx_bits=4))


@dataclass(frozen=True)
class Question:
    """What the user wants to know.

    Attributes:
        model: which model.
        machine: on which Mac.
        cache_share: of what the weights leave of its working set, what the cache may take.
        kv_budget: bytes that the cache may take, in place of that share.
        weights_bits: bits of a weight; None: as published.
        file_bytes: bytes of the weights where their files are here.
        context: tokens of a sequence, or None.
        concurrency: sequences, or None.
        engine: one of ``ENGINES``.
        bandwidth: of memory, bytes per second, or None.
    """

    model: Model
    machine: Machine
    cache_share: float = 1.0
    kv_budget: int | None = None
    weights_bits: int | None = None
    file_bytes: int | None = None
    context: int | None = None
    concurrency: int | None = None
    engine: str = "mlx_lm"
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name in ("context", "concurrency"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ValueError(f"--{name} {given} must be at least 1")
            if given is not None and given > MOST:
                raise ValueError(f"--{name} {given} must be at most {MOST}")
        if self.engine not in ENGINES:
            raise ValueError(
                f"--engine {self.engine!r} is unknown: allowed are {', '.join(ENGINES)}"
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return self._file_bytes or self.model.weight_bytes(self.weights_bits)

    @property
    def read_bytes(self) -> int:
        """Of the weights, bytes that a decode step reads."""
        part = self.model.weights.read_by(self.concurrency or 1)
        if self._file_bytes:
            return self._file_bytes * part.count // self.model.weights.count
        return self.model.weight_bytes(self.weights_bits, part)

    @property
    def _file_bytes(self) -> int | None:
        return self.file_bytes if self.weights_bits is None else None

    @property
    def left(self) -> int:
        """Bytes of the working set that the weights leave.

        Raises:
            ValueError: they leave none.
        """
        allowed = self.machine.working_set_bytes
        left = allowed - self.weight_bytes
        if left <= 0:
            raise ValueError(
                f"the weights of {self.model.name} take {self.weight_bytes / GIB:.2f} GiB, a "
                f"process may use {allowed / GIB:.2f} GiB of {self.machine.memory_bytes / GIB:g} "
                "GiB of memory: take fewer --weights-bits or a smaller model"
            )
        return left

    @property
    def budget(self) -> int:
        """Bytes that the cache may take.

        Raises:
            ValueError: the weights leave none.
        """
        share = int(self.cache_share * self.left)
        return share if self.kv_budget is None else self.kv_budget


@dataclass(frozen=True)
class Row:
    """What fits with one scheme.

    Attributes:
        scheme: the scheme.
        cache: its cache, or None where the engine does not offer it.
        note: why not; or which layers are compressed, where some are not.
        max_context: the longest context of as many sequences as were asked for (1); None where it
            is not bounded.
        max_concurrency: the most sequences of the context that was asked for (4,096 tokens).
        fits: whether what was asked for fits, None where no context was given.
    """

    scheme: Scheme
    cache: Cache | None
    note: str = ""
    max_context: int | None = None
    max_concurrency: int | None = None
    fits: bool | None = None

    @property
    def ours(self) -> bool:
        """Whether the scheme is this library's."""
        return self.scheme.config is not None

    @property
    def bytes_per_token(self) -> int | None:
        """What one more token takes, None where the engine does not offer the cache."""
        return self.cache.token_bytes if self.cache else None


@dataclass(frozen=True)
class Plan:
    """The answer to a question.

    Attributes:
        question: the question.
        rows: one for each scheme.
    """

    question: Question
    rows: Sequence[Row]

    @property
    def decode_context(self) -> int | None:
        """The context to compare decode speeds at: the given one, or what each row has room for.

        None where some row has room for none.
        """
        if self.question.context:
            return self.question.context
        found = [row.max_context for row in self.rows if row.max_context is not None]
        limit = self.question.model.max_position
        return min([*found, limit] if limit else found, default=CONTEXT) or None

    def decode_rate(self, row: Row) -> float | None:
        """Tokens per second of all sequences together, if a step were nothing but reading bytes.

        An upper bound: the kernels' instructions, launches, activations, sampling and whatever
        keeps memory below its full bandwidth are left out. None where no chip was named or the
        engine does not offer the cache.
        """
        question, tokens = self.question, self.decode_context
        if not question.bandwidth or row.cache is None or tokens is None:
            return None
        sequences = question.concurrency or 1
        read = question.read_bytes + sequences * row.cache.read_bytes(tokens)
        return sequences * question.bandwidth / read

    def fields(self) -> dict[str, Any]:
        """The plan as ``--json`` prints it."""
        question = self.question
        return {
            "model": question.model.name,
            "memory_bytes": question.machine.memory_bytes,
            "kv_budget_bytes": question.budget,
            "rows": [self._row_fields(row) for row in self.rows],
        }

    def _row_fields(self, row: Row) -> dict[str, Any]:
        return {
            "preset": row.scheme.name,
            "bytes_per_token": row.bytes_per_token,
            "max_context": row.max_context,
            "max_concurrency": row.max_concurrency,
            "fits": row.fits,
            "weight_bytes": self.question.weight_bytes,
            "working_set_bytes": self.question.machine.working_set_bytes,
            "decode_tps": self.decode_rate(row),
            "decode_context": self.decode_context,
            "note": row.note,
        }


def schemes(extra: TurboQuantConfig | None = None) -> list[Scheme]:
    """bf16, mlx_lm's quantised caches, every preset, and ``extra`` where it is none of them."""
    configs = [TurboQuantConfig.from_names(preset) for preset in PRESETS]
    if extra is not None and extra not in configs:
        configs.append(extra)
    return [*BASELINES, *(Scheme(config.label, config) for config in configs)]


def plan(question: Question, which: Sequence[Scheme]) -> Plan:
    """Plan each scheme.

    Raises:
        ValueError: the weights leave no memory for a cache.
    """
    budget = question.budget
    return Plan(question, [_row(question, budget, scheme) for scheme in which])


def _row(question: Question, budget: int, scheme: Scheme) -> Row:
    try:
        cache = ENGINES[question.engine](question.model, scheme)
    except Unsupported as error:
        return Row(scheme, None, note=str(error))
    context, sequences = question.context or CONTEXT, question.concurrency or 1
    fits = cache.nbytes(context, sequences) <= budget
    return Row(
        scheme,
        cache,
        _note(cache),
        max_context=_longest(cache, budget, sequences),
        max_concurrency=_most(lambda count: cache.nbytes(context, count) <= budget),
        fits=fits if question.context else None,
    )


def _note(cache: Cache) -> str:
    attention = sum(layer.kv_heads > 0 for layer in cache.model.layers)
    if cache.scheme.config is None or cache.num_compressed == attention:
        return ""
    return f"compresses {cache.num_compressed} of {attention} layers"


def _longest(cache: Cache, budget: int, sequences: int) -> int | None:
    if not cache.token_bytes and cache.nbytes(1 << 40, sequences) <= budget:
        return None
    return _most(lambda tokens: cache.nbytes(tokens, sequences) <= budget)


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by bisection; 0 where 1 does not fit."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
