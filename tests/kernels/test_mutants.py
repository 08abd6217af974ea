"""Every mutant of the kernels is caught, so the checks behind the kernels' tests do their work.

A mutant is caught when clang refuses its text, when the simulator reports a fault, or when a
result is not the oracle's. ``make mutants`` tries all of them, a default run a few.
"""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from unittest import mock

import centres
import mlx.core as mx
import numpy as np
import pytest
from kernels.mutants import CENTRING, EQUIVALENT, FILES, KERNELS, TRELLIS, Mutant, mutants
from kernels.reference import Case, Centring
from rows import decoded

from vllm_metal_tq import codec, msl
from vllm_metal_tq.config import T2, T3, TurboQuantConfig
from vllm_metal_tq.kernels import decode as decode_kernel
from vllm_metal_tq.kernels import launch as launches
from vllm_metal_tq.kernels.decode import decode
from vllm_metal_tq.kernels.encode import encode, store
from vllm_metal_tq.kernels.gather import gather
from vllm_metal_tq.layout import PageLayout
from vllm_metal_tq.msl import simulate as simulation
from vllm_metal_tq.rotation import rotate, unrotate
from vllm_metal_tq.tail import TAIL, pushed, sources

needs_simulator = pytest.mark.skipif(
    not msl.can_simulate(), reason=str(msl.compiler.why_not_simulate())
)

_check = simulation._check
BOUND = 5e-4  # as in test_decode.py
SECONDS = 240  # for one mutant, which may not end
AT_A_TIME = 40  # mutants of one process, which keeps every kernel that it has built


# ---- Cases: each runs a kernel once or a few times and says whether its results are right


def attends(variant, lengths, *, max_tokens=None, splits=None, bound=BOUND, **case):
    """``max_tokens`` above the longest context: more splits."""
    made = _case(tuple(lengths), tuple(case.items()))
    tokens = {"max_tokens": max_tokens} if max_tokens else {}

    def decoding(*arguments, **options):
        return decode(*arguments, **options | tokens)

    as_many = {"return_value": splits} if splits else {"wraps": decode_kernel._splits}
    with mock.patch.object(decode_kernel, "_splits", **as_many):
        return made.error(decoding, variant=variant, execute=run) < bound


def attends_to_nothing():
    """A sequence without tokens gets zeros."""
    made = _case((0, 20), ())
    got = np.array(made.attended(decode, variant="mma", execute=run))
    return not got[0].any() and np.isfinite(got).all()


def attends_beside_nan(variant, lengths, **case):
    """The scales behind the last token are NaN."""
    made = Case(lengths, **{"dtype": mx.float32} | case)
    page, size = made.layout, made.layout.config.block_size
    table = np.array(made.block_table)
    slots = [table[i, n // size] * size + n % size for i, n in enumerate(lengths)]
    rows = mx.full((made.pool.pages.shape[1], len(slots), page.code_bytes + 4), 255, mx.uint8)
    made.pool.write((tuple(map(int, slots)),), rows[None])
    return made.error(decode, variant=variant, execute=run) < BOUND


def attends_to_zeros(variant, lengths, **case):
    """Tokens without flags whose keys and values are zero have scales of zero."""
    made = Case(lengths, **{"dtype": mx.float32} | case)
    page = made.layout
    slots = np.array(made.block_table[:, :1]) * page.config.block_size + [0, 8]
    rows = mx.zeros((made.pool.pages.shape[1], slots.size, page.code_bytes + 4), mx.uint8)
    made.pool.write((tuple(slots.ravel().tolist()),), rows[None])
    return made.error(decode, variant=variant, execute=run) < BOUND


@cache
def _case(lengths, options) -> Case:
    return Case(list(lengths), **{"dtype": mx.float32} | dict(options))


def encodes(widths, head_dim, *, tokens=61, heads=2, power=1, same=0.97, dtype=mx.float32):
    """A wrong code here and there is no fault, see test_encode.py; a worse one is."""
    page, keys, values, oracle = _to_encode(widths, head_dim, tokens, heads, power, dtype)
    rows = encode(keys, values, page, run)
    if (rows == oracle).all(axis=-1).astype(mx.float32).mean().item() < same:
        return False
    found, best = (_square_errors(x, page, keys, values) for x in (rows, oracle))
    return all(x <= 1.001 * y + 1e-9 for x, y in zip(found, best, strict=True))


@cache
def _to_encode(widths, head_dim, tokens, heads, power, dtype):
    page = PageLayout(TurboQuantConfig(*widths), head_dim)
    x = mx.random.normal((2, heads, tokens, head_dim), key=mx.random.key(widths[0])) ** power
    keys, values = x.astype(dtype)
    return page, keys, values, codec.encode(keys, values, page)


def _square_errors(rows, page, keys, values):
    pairs = zip(decoded(rows, page), (keys, values), strict=True)
    return [(x - rotate(y)).square().sum().item() for x, y in pairs]


def encodes_alike(widths, head_dim):
    """How many lanes share a vector changes no row, where many ways cost the same either."""
    page = PageLayout(TurboQuantConfig(*widths), head_dim)
    y = mx.concatenate([mx.eye(head_dim)[:11], mx.zeros((1, head_dim))])  # of one element, or none
    x = unrotate(y, head_dim)[None]
    few, many = (encode(x, x, page, run, many=given) for given in (False, True))
    return mx.array_equal(few, many).item()


def encodes_what_it_cannot(widths):
    """Zeros decode to zeros; a NaN reaches the scale of its own vector only."""
    page = PageLayout(TurboQuantConfig(*widths), 64)
    x = mx.random.normal((1, 9, 64), key=mx.random.key(0))
    x[0, 3], x[0, 5, 7] = 0, mx.nan
    rows = encode(x, x, page, run)
    good = mx.isfinite(rows[..., page.code_bytes :].view(mx.float16)).all(axis=-1)[0]
    zeros = [mx.all(y[0, 3] == 0).item() for y in decoded(rows, page)]
    return all(zeros) and good.tolist() == [i != 5 for i in range(9)]


def encodes_zeros():
    """Elements that are zero after the rotation get the codec's codes."""
    page = PageLayout(TurboQuantConfig(4, 4), 64)
    x = mx.eye(64)[None, :32] + mx.eye(64)[None, 32:]
    rows, oracle = encode(x, x, page, run), codec.encode(x, x, page)
    return mx.array_equal(rows[..., : page.code_bytes], oracle[..., : page.code_bytes]).item()


def stores(widths, head_dim, *, tokens=40, index=7, uncentred=3):
    """Two sequences with a centre and tails; the first tokens keep their means."""
    page, centre = PageLayout(TurboQuantConfig(*widths), head_dim), centres.random(2, head_dim)
    places, indices = (0, 500), (index, index + 18)
    pairs = [centres.typical(centre, tokens, first, first) for first in places]
    fresh = [mx.stack(x) for x in zip(*pairs, strict=True)]
    rings = [mx.random.normal((2, 2, TAIL, head_dim), key=mx.random.key(i)) for i in range(2)]
    starts = mx.array(list(zip(places, indices, strict=True)), mx.int32)
    options = {"starts": starts, "centre": centre, "uncentred": uncentred}
    rows, *found = store(*fresh, rings, page, **options, execute=run)
    source = sources(indices, tokens)
    expected = [pushed(*x, source) for x in zip(rings, fresh, strict=True)]
    oracle = []
    for pair, first in zip(pairs, places, strict=True):
        positions = mx.arange(first, first + tokens)
        every = [codec.encode(*pair, page, x, positions) for x in (centre.without_mu, centre)]
        oracle.append(mx.concatenate([every[0][:, :uncentred], every[1][:, uncentred:]], axis=1))
    oracle = mx.stack(oracle)
    same = (rows == oracle).all(axis=-1).astype(mx.float32).mean().item()
    flags = (x[..., page.code_bytes + 1 :: 2] >= 128 for x in (rows, oracle))
    tails_same = all(mx.array_equal(*x) for x in zip(found, expected, strict=True))
    return same > 0.9 and mx.array_equal(*flags).item() and tails_same


def gathers(widths, head_dim, tokens, block_size=16, dtype=mx.float32, room=0):
    page, pages, table = _to_gather(widths, head_dim, tokens, block_size)
    found = gather(pages, mx.array(table, mx.int32), tokens, page, dtype, run, room=room)
    oracle = codec.decode(pages[mx.array(table)], page)
    wanted = [x.swapaxes(0, 1).reshape(2, -1, page.dim)[:, :tokens] for x in oracle]
    wanted = [mx.pad(x, [(0, 0), (0, room), (0, 0)]) for x in wanted]
    return all(mx.array_equal(x, y.astype(dtype)) for x, y in zip(found, wanted, strict=True))


@cache
def _to_gather(widths, head_dim, tokens, block_size):
    page = PageLayout(TurboQuantConfig(*widths, block_size), head_dim)
    table = list(range(-(-tokens // block_size), 0, -1))
    rng = np.random.default_rng(0)
    pages = rng.integers(0, 256, (len(table) + 1, 2, page.page_bytes), np.uint8)
    scales = rng.uniform(0.1, 2, (len(table) + 1, 2, block_size, 2)).astype(np.float16)
    pages[..., page.byte_offsets[:, page.code_bytes :]] = scales.view(np.uint8)
    return page, mx.array(pages), table


# Neighbours share a kernel where they can: building it takes most of the time.
GROWS = {"loud": 8.0, "bound": 3 * BOUND}  # rounding grows with logits, see test_decode.py
SKIPS = dict(GROWS, sparse_v=1e-4)  # values of a third of the sub-blocks
SHORT = [
    (attends, [1, 15, 17, 33], dict(widths=(3, 3), heads=(3, 1), head_dim=64, block_size=32)),
    (attends, [33, 90], dict(widths=(3, 3), heads=(3, 1), head_dim=64, block_size=32, window=9)),
    (attends, [333], dict(GROWS, widths=(3, 3), heads=(3, 1), head_dim=64, block_size=32)),
    (attends, [40, 333], dict(heads=(12, 2), rows=2, head_dim=80, max_tokens=1100)),
    (attends_beside_nan, [25, 68], dict(heads=(12, 2), rows=2, head_dim=80)),
    (attends, [9, 16], dict(heads=(12, 2), rows=2, head_dim=80)),
    (attends, [0, 33], dict(heads=(12, 2), rows=2, head_dim=80, tail=2)),
    (attends, [16, 48], dict(heads=(12, 2), rows=2, head_dim=80, window=16, max_tokens=300)),
    (attends, [33, 47], dict(heads=(12, 2), rows=2, head_dim=80, window=2, tail=1)),
    (attends, [16], dict(heads=(2, 2), head_dim=64, tail=32, window=2)),
    (attends, [32], dict(widths=(2, 8), head_dim=32, heads=(1, 1), max_tokens=600)),
    (attends, [333, 20, 256], dict(widths=(6, 5), head_dim=256, heads=(4, 2), rows=3, loud=4.0)),
]
CODED = [  # by a trellis
    (attends, [40], dict(widths=(T3, T2), head_dim=64, heads=(3, 1))),
    (attends, [40], dict(widths=(T2, T3), head_dim=160, heads=(2, 1))),
    (attends, [33], dict(widths=(T3, T3), head_dim=32, heads=(1, 1))),
    (attends, [50], dict(widths=(T2, T2), head_dim=128, heads=(2, 1), block_size=32)),
    (attends, [50], dict(widths=(T3, T2), head_dim=224, heads=(1, 1))),
]
LONG = [
    (attends, [40, 65], dict(widths=(8, 4), head_dim=160, heads=(8, 1), block_size=32)),
    (attends, [8, 60], dict(heads=(5, 1), rows=8, head_dim=128, window=20)),
    (attends, [1 + 13 * i for i in range(3)], dict(heads=(4, 2))),
    (attends, [27 + 13 * i for i in range(2)], dict(heads=(4, 2), softcap=5.0, loud=4.0)),
    (attends, [50], dict(widths=(5, 6), head_dim=64, heads=(1, 1))),
    (attends, [50], dict(widths=(4, 2), head_dim=96, heads=(3, 1), sparse_v=1e-9, loud=4.0)),
    (attends, [50], dict(widths=(3, 3), head_dim=32, heads=(7, 1), block_size=32)),
    (attends, [50], dict(widths=(2, 3), head_dim=224, heads=(4, 1))),
    (attends, [50], dict(widths=(3, 2), head_dim=192, heads=(1, 1), dtype=mx.float16)),
    (attends, [50], dict(widths=(6, 3), head_dim=128, heads=(6, 2))),
    (attends, [50], dict(widths=(8, 8), head_dim=64, heads=(3, 1))),
    (attends, [50], dict(widths=(5, 5), head_dim=256, heads=(8, 1))),
]
FAR = Centring(mean=1.0, shift=(10**6, 131071))
PARTIAL = Centring(turned=32, neighbours=True, mean=1.0, shift=(0, 10**6))
MERGES = [
    (attends, [0, 47], dict(rows=3, tail=5, max_tokens=4000)),
    (attends, [0, 47], dict(rows=3, tail=5, window=7)),
    (attends, [30, 47], dict(rows=2, tail=9, window=1, sinks=True, max_tokens=5000)),
    (attends, [30, 47], dict(rows=2, tail=20, sinks=True, loud=4.0)),
    (attends, [20], dict(head_dim=80, heads=(6, 2), max_tokens=3000)),
    (attends, [30], dict(head_dim=80, heads=(6, 2), tail=3, softcap=5.0, dtype=mx.float16)),
    (attends, [20], dict(head_dim=256, heads=(6, 2), tail=3, sinks=True)),
    (attends, [20], dict(head_dim=32, heads=(3, 1), sinks=True)),
    (attends, [20, 0], dict(head_dim=80, heads=(6, 2), tail=3, centring=PARTIAL)),
    (attends, [90], dict(head_dim=64, heads=(2, 2), centring=FAR, max_tokens=5000)),
]
# One split: a SIMD-group centres several times, and the windows of decode_mma are longer.
SMALL = dict(heads=(1, 1), rows=3, head_dim=64, block_size=32, centring=FAR)
CENTRED = [
    (attends, [17, 333], SMALL),
    (attends, [333, 40], dict(heads=(4, 2), head_dim=80, centring=PARTIAL, splits=1)),
    (attends, [40, 300], dict(heads=(4, 2), head_dim=80, centring=PARTIAL, window=9, tail=2)),
    (attends, [555, 20], dict(heads=(6, 1), centring=FAR, splits=1)),
    (attends, [333], dict(heads=(6, 2), rows=3, centring=FAR, splits=1)),
    (attends, [1100], dict(SKIPS, heads=(2, 2), head_dim=64, centring=FAR, splits=1)),
    (attends, [90], dict(heads=(2, 2), widths=(3, 6), head_dim=256, centring=FAR)),
    (attends_to_zeros, [17, 333], SMALL),
]
CODED_ENCODES = [
    (encodes, (T3, T2), dict(head_dim=64, same=0.9)),
    (encodes_alike, (T2, T3), dict(head_dim=64)),  # 8 lanes a pair and 32
    (encodes_alike, (T2, T2), dict(head_dim=128)),  # 16 and 32
    (encodes, (T3, T3), dict(head_dim=32, same=0.9)),
    (encodes, (T2, 3), dict(head_dim=96, same=0.9)),
    (encodes_what_it_cannot, dict(widths=(T2, T3))),
]
ENCODES = [
    (stores, (4, 4), dict(head_dim=64)),
    (stores, (3, 5), dict(head_dim=80, tokens=3)),
    (encodes, (3, 3), dict(head_dim=96)),
    (encodes, (4, 4), dict(head_dim=64)),
    (encodes, (4, 4), dict(head_dim=64, tokens=1, heads=1, same=1)),
    *CODED_ENCODES,
    (encodes_what_it_cannot, dict(widths=(4, 4))),
    (encodes_zeros,),
    (encodes, (5, 6), dict(head_dim=80, same=0.93)),
    (encodes, (8, 8), dict(head_dim=128, same=0.8, dtype=mx.bfloat16)),
    (encodes, (6, 2), dict(head_dim=256)),
    (encodes, (2, 5), dict(head_dim=320)),
    (encodes, (3, 3), dict(head_dim=32, power=3)),
    (encodes, (5, 3), dict(head_dim=160, dtype=mx.float16)),
    (encodes, (3, 5), dict(head_dim=224)),
    (encodes, (3, 5), dict(head_dim=8, tokens=7)),
    (encodes, (4, 4), dict(head_dim=512, tokens=20)),
]
CODED_GATHERS = [(gathers, (T3, T2), dict(head_dim=96, tokens=17))]
GATHERS = [
    (gathers, (3, 5), dict(head_dim=96, tokens=33, room=4)),
    (gathers, (8, 4), dict(head_dim=64, tokens=1)),
    (gathers, (6, 2), dict(head_dim=80, tokens=150, block_size=32, dtype=mx.float16)),
    (gathers, (2, 8), dict(head_dim=256, tokens=17, dtype=mx.bfloat16)),
    *CODED_GATHERS,
]


def cases(file: str) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Names and cases for a file's mutants, those that catch most of them first."""
    encoding, gathering, attending = ENCODES, GATHERS, SHORT + CODED + CENTRED + LONG
    if file in CENTRING:
        attending = CENTRED
    if file in TRELLIS:
        encoding, gathering, attending = CODED_ENCODES, CODED_GATHERS, CODED
    of = {"encode": encoding, "gather": gathering}
    of |= {f"decode_{x}": [_with(x, *case) for case in attending] for x in ("mma", "fma")}
    of["merge"] = [*(_with("mma", *case) for case in MERGES), (attends_to_nothing,)]
    kernels = [Path(file).stem] if Path(file).stem in KERNELS else KERNELS
    if file in CENTRING + TRELLIS:
        kernels = [kernel for kernel in KERNELS if file in launches._included(kernel)]
    for number in range(max(map(len, of.values()))):
        for kernel in kernels:
            if number < len(of[kernel]):
                function, *positional = of[kernel][number]
                named = positional.pop() if positional else {}
                yield f"{kernel} {positional} {named}", partial(function, *positional, **named)


def _with(variant, function, *arguments):
    return function, variant, *arguments


# ---- Running one mutant


@dataclass(frozen=True)
class Outcome:
    """What found a fault - clang, simulator or oracle, or nothing - in which case, and how."""

    found_by: str
    case: str = ""
    message: str = ""


class RefusedError(Exception):
    """Clang or the simulator reports a fault."""

    def __init__(self, by: str, message: str):
        super().__init__(by, message)
        self.by, self.message = by, message


_checked: set[str] = set()  # kernels that clang has checked since the last change


def run(launch: launches.Launch) -> list[mx.array]:
    """``simulate``, telling clang's faults from the simulator's, with one check of a kernel."""
    try:
        text = simulation.metal_text(launch)
        if launch.kernel not in _checked:
            _checked.add(launch.kernel)
            _check(text)
    except msl.MetalError as fault:
        raise RefusedError("clang", str(fault)) from None
    try:
        return simulation.simulate(launch)
    except msl.MetalError as fault:
        raise RefusedError("simulator", str(fault)) from None


def judge(file: str, text: str) -> Outcome:
    """Run the cases of a file with this text in its place, until one finds a fault."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(shutil.copytree(launches.SOURCES, folder, dirs_exist_ok=True))
        (sources / file).write_text(text)
        with mock.patch.object(launches, "SOURCES", sources):
            forget()
            outcome = _first_fault(file)
        forget()
    return outcome


def forget() -> None:
    """Drop every text of a kernel that is kept."""
    for kept in (launches._source, launches.header, launches._compiled):
        kept.cache_clear()
    simulation._texts.clear()
    _checked.clear()


def _first_fault(file: str) -> Outcome:
    for name, case in cases(file):
        try:
            # Clang's check, which takes as long as the rest, is left to `run`.
            with mock.patch.object(simulation, "_check"):
                right = case()
            if not right:
                return Outcome("oracle", name)
        except RefusedError as fault:
            return Outcome(fault.by, name, fault.message)
    return Outcome("nothing")


# ---- Running many


class Worker:
    """A process that judges one mutant after the other; a mutant may crash it or never end."""

    def __init__(self):
        self.left = 0
        self.process = None

    def judge(self, file: str, text: str) -> Outcome:
        if self.left == 0:
            self.start()
        self.left -= 1
        try:
            self.pipe.send((file, text))
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
        except (EOFError, ConnectionError):
            pass
        self.left = 0
        return Outcome("simulator", message="its process crashed or did not end")

    def start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.left = AT_A_TIME

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()


def serve(pipe) -> None:
    """What a worker's process does."""
    while True:
        pipe.send(judge(*pipe.recv()))


class Workers:
    """As many as there are processors."""

    def __init__(self):
        count = os.cpu_count()
        self.free: SimpleQueue[Worker] = SimpleQueue()
        self.all = [Worker() for _ in range(count)]
        for worker in self.all:
            self.free.put(worker)
        self.pool = ThreadPoolExecutor(count)

    def submit(self, file: str, text: str) -> Future:
        return self.pool.submit(self._judge, file, text)

    def _judge(self, file: str, text: str) -> Outcome:
        worker = self.free.get()
        try:
            return worker.judge(file, text)
        finally:
            self.free.put(worker)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        for worker in self.all:
            worker.stop()


# ---- The tests

ALL = {file: mutants(file) for file in FILES}
REASONS = {(file, line): reason for file, line, reason in EQUIVALENT}
# A barrier, a bound of tokens, a bound of lanes, a shuffle, a clamp, an oracle's own.
SAMPLE = {
    "decode_fma.metal": ["no_barrier; #2", "const int end = min(paged, rows_from + last_row + 0);"],
    "gather.metal": ["if (token > num_tokens[0]) {"],
    "encode.metal": [
        "const bool live = wanted <= vectors && (TAKEN % SHARED_OUT == 0 || place < TAKEN);",
        "flag = tq_leave_out<LANES>(y, mean, its_means[4 * D], token > count[2]);",
    ],
}


def complaint(mutant: Mutant, outcome: Outcome) -> str:
    """What is wrong about a mutant's outcome, or nothing."""
    reason = REASONS.get((mutant.file, mutant.line))
    if reason is None and outcome.found_by == "nothing":
        return f"not caught: {mutant}"
    if reason is not None and outcome.found_by != "nothing":
        return f"listed as equivalent ({reason}), but {outcome} catches {mutant}"
    return ""


@needs_simulator
@pytest.mark.parametrize("file", SAMPLE)
def test_a_few_mutants_are_caught(file):
    sample = [mutant for mutant in ALL[file] if mutant.line in SAMPLE[file]]
    assert len(sample) == len(SAMPLE[file])
    assert not [c for mutant in sample if (c := complaint(mutant, judge(file, mutant.text)))]


def test_what_is_listed_as_equivalent_is_there():
    lines = {(mutant.file, mutant.line) for file in FILES for mutant in ALL[file]}
    assert sorted(set(REASONS) - lines) == []
    assert len(REASONS) == len(EQUIVALENT)


@pytest.fixture(scope="module")
def outcomes(request):
    """For every file and text that a chosen test needs, an outcome that is under way."""
    calls = [
        item.callspec.params for item in request.session.items if "outcomes" in item.fixturenames
    ]
    workers = Workers()
    yield {key: workers.submit(*key) for key in dict.fromkeys(_key(**call) for call in calls)}
    workers.close()


def _key(file=None, mutant=None) -> tuple[str, str]:
    return (mutant.file, mutant.text) if mutant else (file, (launches.SOURCES / file).read_text())


@pytest.mark.nightly
@needs_simulator
@pytest.mark.parametrize("file", FILES)
def test_kernels_as_they_are_pass_the_cases(file, outcomes):
    assert outcomes[_key(file)].result() == Outcome("nothing")


@pytest.mark.nightly
@needs_simulator
@pytest.mark.parametrize("mutant", [m for file in FILES for m in ALL[file]], ids=str)
def test_every_mutant_is_caught(mutant, outcomes):
    assert not complaint(mutant, outcomes[_key(mutant=mutant)].result())
