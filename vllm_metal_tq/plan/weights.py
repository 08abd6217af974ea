"""How many bytes weights take, and how many of them a decode step reads."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 64  # elements that share a scale and a bias in mlx_lm's quantisation
GROUPS = (32, GROUP, 128)  # what mlx offers
BITS = (2, 3, 4, 5, 6, 8, 16)


@dataclass(frozen=True)
class Weights:
    """Elements of a model's weights, by what becomes of them.

    Attributes:
        matrices: of linear layers and embeddings, which mlx_lm quantises; without the experts.
        experts: of all experts' matrices, of which a token reads a few.
        vectors: norms, biases and what else is kept in 16 bits.
        tables: of ``matrices``, those of which a token reads one row.
        used: of ``experts``, what one token reads.
    """

    matrices: int = 0
    experts: int = 0
    vectors: int = 0
    tables: int = 0
    used: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(*(a + b for a, b in zip(self._all, other._all, strict=True)))

    @property
    def _all(self) -> tuple[int, ...]:
        return self.matrices, self.experts, self.vectors, self.tables, self.used

    @property
    def count(self) -> int:
        """Elements in all: the model's parameters."""
        return self.matrices + self.experts + self.vectors

    def as_experts(self, count: int, used: int) -> Weights:
        """``count`` experts of this shape, of which a token uses ``used``."""
        return Weights(
            experts=count * self.matrices,
            vectors=count * self.vectors,
            used=min(used, count) * self.matrices,
        )

    def as_table(self) -> Weights:
        """The same as a table of which a token reads one row."""
        return Weights(matrices=self.matrices, vectors=self.vectors, tables=self.matrices)

    def nbytes(self, bits: int, group: int = GROUP) -> int:
        """Bytes in memory: 16 is bf16; fewer are codes, and an fp16 scale and bias a group.

        Raises:
            ValueError: no such width.
        """
        if bits not in BITS:
            raise ValueError(f"{bits} bits a weight: allowed are {', '.join(map(str, BITS))}")
        return _bytes(self.matrices + self.experts, bits, group) + 2 * self.vectors

    @property
    def mxfp4_bytes(self) -> int:
        """Bytes where experts are MXFP4, 4 bits and an 8-bit scale for 32, and the rest bf16."""
        return self.experts * 17 // 32 + 2 * (self.matrices + self.vectors)

    def read_by(self, sequences: int) -> Weights:
        """What a decode step of so many sequences reads of them.

        Each sequence is taken to use experts of its own, until all are used.
        """
        experts = min(sequences * self.used, self.experts)
        return Weights(self.matrices - self.tables, experts, self.vectors)


NOTHING = Weights()


def linear(inputs: int, outputs: int, bias: bool = False) -> Weights:
    """A matrix, and its bias; an embedding is a matrix too, of ``outputs`` rows.

    mlx_lm quantises no matrix whose rows are not made of whole groups.
    """
    count, extra = inputs * outputs, outputs if bias else 0
    return Weights(vectors=count + extra) if inputs % GROUP else Weights(count, vectors=extra)


def vector(count: int) -> Weights:
    """Elements that are kept in 16 bits."""
    return Weights(vectors=count)


def _bytes(elements: int, bits: int, group: int) -> int:
    return 2 * elements if bits == 16 else elements * bits // 8 + 4 * elements // group
