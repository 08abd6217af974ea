"""Train the levels of trellis codes on N(0, 1) and measure what they are worth.

    python tools/train_trellis.py [--vectors 8192] [--rounds 16] [--seed 0] [--search N]

prints the coefficients of ``TRELLIS_LEVELS`` (vllm_metal_tq/codebook.py), and of other vectors, at
three dims, the mean square error and the gains (``KEY_GAINS``, ``VALUE_GAINS`` in codec.py).
Takes a minute or two on a CPU. A level is linear in its two coefficients, so encoding and a fit of
least squares take turns, as in Lloyd's algorithm (Lloyd 1982).

With --search the masks of ``MASKS`` (vllm_metal_tq/trellis.py) are not taken as given: random ones
are tried on few vectors, and the best are trained. The committed masks are of a longer search on a
GPU, among about 50,000 candidates for each width: random ones first, then changes of the best.
Levels were w (a + b w^2 + c w^16) there, and of masks as good those that take fewer bits won.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace

from vllm_metal_tq import openblas

openblas.preload()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from vllm_metal_tq.codebook import Octic  # noqa: E402
from vllm_metal_tq.config import TRELLIS_WIDTHS, bits_of  # noqa: E402
from vllm_metal_tq.trellis import MASKS, MEMORY, PARITIES, Trellis  # noqa: E402

DIM = 128  # of the vectors that levels are trained on
DIMS = (64, 128, 256)
START = (1.6, 1.4)  # coefficients that training starts from
DIGITS = 4  # of a coefficient, behind the point
SEARCH_VECTORS, SEARCH_ROUNDS, KEPT = 128, 3, 3


def main() -> None:
    """Train both widths and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vectors", type=int, default=8192, help="vectors of 128 to train on")
    parser.add_argument("--rounds", type=int, default=16, help="encodings, a fit after each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="try N random masks on 128 vectors and train the best three of each width",
    )
    args = parser.parse_args()
    for name in ("vectors", "rounds", "search"):
        if (given := getattr(args, name)) is not None and given < 1:
            parser.error(f"--{name} {given} must be at least 1")
    y = normal(args.vectors, DIM, args.seed)
    for width in TRELLIS_WIDTHS:
        candidates = [MASKS[width]]
        if args.search:
            candidates = search(width, args.search, args.seed)
        for masks in candidates:
            print(report(trained(width, masks, y, args.rounds), args.vectors, args.seed + 1))


def normal(count: int, dim: int, seed: int) -> mx.array:
    """Vectors of N(0, 1): float32 ``(count, dim)``."""
    return mx.random.normal((count, dim), key=mx.random.key(seed))


def trained(width: int, masks: tuple[int, ...], y: mx.array, rounds: int) -> Trellis:
    """The trellis of these masks with levels for ``y``, float32 ``(n, dim)``."""
    # Two bits more than a code has: the sets are eight, and a code's c chooses one of two.
    bits = bits_of(width) + PARITIES - 1
    x = np.array(y / mx.sqrt(mx.square(y).mean(axis=-1, keepdims=True)), np.float64)
    trellis = Trellis(masks, Octic(bits, *START))
    for _ in range(rounds):
        codes, _ = trellis.nearest(y, 1.0)
        numbers = trellis.numbers(np.array(codes).T).T
        w = (2.0 * numbers + 1) / (1 << bits) - 1
        basis = np.stack([w.ravel(), w.ravel() ** 9], axis=1)
        a, b = np.linalg.solve(basis.T @ basis, basis.T @ x.ravel())
        trellis = replace(trellis, codebook=Octic(bits, float(a), float(b)))
    book = trellis.codebook
    return replace(trellis, codebook=Octic(bits, round(book.a, DIGITS), round(book.b, DIGITS)))


def measured(trellis: Trellis, y: mx.array) -> tuple[float, float, float]:
    """Of vectors ``(n, dim)`` the mean square error over their energy, and both gains.

    The gain of keys makes the product of a key and its code as large as that of the key and
    itself; that of values makes codes as long as values, on average.
    """
    codes, step = trellis.nearest(y, 1.0)
    numbers = mx.array(trellis.numbers(np.array(codes).T).T)
    levels = trellis.codebook.levels(numbers) * step[:, None].astype(mx.float32)
    x, restored = (np.array(part, np.float64) for part in (y, levels))
    energy = float(np.square(x).sum())
    error = float(np.square(x - restored).sum()) / energy
    lengths = np.linalg.norm(restored, axis=1) / np.linalg.norm(x, axis=1)
    return error, energy / float((x * restored).sum()), 1 / float(lengths.mean())


def report(trellis: Trellis, vectors: int, seed: int) -> str:
    """What was trained, and what it is worth at each dim."""
    book = trellis.codebook
    lines = [
        f"{book.bits + 1 - PARITIES} bits: masks {trellis.masks}, a {book.a:.4f}, b {book.b:.4f}"
    ]
    for dim in DIMS:
        error, key_gain, value_gain = measured(trellis, normal(vectors, dim, seed))
        gains = f"gain of keys {key_gain:.4f}, of values {value_gain:.4f}"
        lines.append(f"  D={dim}: error {error:.5f}, {gains}")
    return "\n".join(lines)


def search(width: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """The best of random masks, by their error on few vectors."""
    y = normal(SEARCH_VECTORS, DIM, seed)

    def error(masks: tuple[int, ...]) -> float:
        return measured(trained(width, masks, y, SEARCH_ROUNDS), y)[0]

    return sorted(set(random_masks(count, seed)), key=error)[:KEPT]


def random_masks(count: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Masks of three parities each, no parity of nothing."""
    rng = random.Random(seed)
    for _ in range(count):
        yield tuple(rng.randrange(1, 2 << MEMORY) for _ in range(PARITIES))


if __name__ == "__main__":
    main()
