"""The training of trellis codes, at a small size."""

import re
import sys

import mlx.core as mx
import pytest
import train_trellis

from vllm_metal_tq.codebook import TRELLIS_LEVELS
from vllm_metal_tq.codec import KEY_GAINS, VALUE_GAINS
from vllm_metal_tq.config import TRELLIS_WIDTHS
from vllm_metal_tq.trellis import MASKS, TRELLISES


@pytest.fixture(scope="module")
def vectors():
    return train_trellis.normal(256, 128, 5)


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_training_finds_levels_as_good_as_those_of_the_codec(width, vectors):
    found = train_trellis.trained(width, MASKS[width], vectors, 8)
    assert found.codebook.bits == TRELLIS_LEVELS[width].bits
    error, *_ = train_trellis.measured(found, vectors)
    wanted, *_ = train_trellis.measured(TRELLISES[width], vectors)
    assert error == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_training_lowers_the_error_of_a_bad_start(width, vectors, monkeypatch):
    monkeypatch.setattr(train_trellis, "START", (2.2, 0.4))
    first, last = (
        train_trellis.measured(train_trellis.trained(width, MASKS[width], vectors, rounds), vectors)
        for rounds in (0, 8)
    )
    assert last[0] < 0.95 * first[0]


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_gains_are_those_of_the_codec(width, vectors):
    _, of_keys, of_values = train_trellis.measured(TRELLISES[width], vectors)
    assert of_keys == pytest.approx(KEY_GAINS[width], abs=3e-3)
    assert of_values == pytest.approx(VALUE_GAINS[width], abs=2e-3)


def test_bad_masks_have_a_larger_error(vectors):
    (width, *_), some = TRELLIS_WIDTHS, vectors[:64]
    bad = train_trellis.trained(width, (1, 1, 1), some, 3)  # two of the eight sets
    good = train_trellis.trained(width, MASKS[width], some, 3)
    assert train_trellis.measured(bad, some)[0] > 1.3 * train_trellis.measured(good, some)[0]


def test_a_search_prints_the_best_three_of_each_width(capsys, monkeypatch):
    arguments = ["train_trellis.py", "--vectors", "8", "--rounds", "1", "--search", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(train_trellis, "SEARCH_VECTORS", 8)
    train_trellis.main()
    printed = re.findall(r"(\d) bits: masks \(\d+, \d+, \d+\)", capsys.readouterr().out)
    assert printed == ["2"] * 3 + ["3"] * 3


def test_no_vectors_are_an_error(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_trellis.py", "--vectors", "0"])
    with pytest.raises(SystemExit) as error:
        train_trellis.main()
    assert error.value.code == 2
    assert "--vectors 0 must be at least 1" in capsys.readouterr().err


def test_vectors_are_of_the_seed():
    assert mx.array_equal(train_trellis.normal(2, 8, 1), train_trellis.normal(2, 8, 1))
    assert not mx.array_equal(train_trellis.normal(2, 8, 1), train_trellis.normal(2, 8, 2))
