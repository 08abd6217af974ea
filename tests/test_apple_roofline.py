"""The estimate for Apple GPUs: instructions that clang's IR holds, and what is made of them."""

import importlib.util
import sys
from pathlib import Path

import pytest

from vllm_metal_tq import msl
from vllm_metal_tq.msl.compiler import why_not_simulate

needs_clang = pytest.mark.skipif(not msl.can_simulate(), reason=str(why_not_simulate()))


@pytest.fixture(scope="module")
def roofline():
    path = Path(__file__).parents[1] / "benchmarks" / "apple_roofline.py"
    spec = importlib.util.spec_from_file_location("apple_roofline", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@needs_clang
def test_matrix_instructions_are_those_of_the_products(roofline):
    # Keys and values, 16 tokens by 64 dimensions each, 8 by 8.
    assert roofline.count("mma", 4, 4, 4, 64).counts["matrix"] == 2 * 2 * 8
    assert roofline.count("fma", 2, 4, 4, 64).counts["matrix"] == 0


@needs_clang
@pytest.mark.parametrize("columns", [2, 4])
def test_fma_multiplies_for_every_column(roofline, columns):
    # Of 16 * 64 elements each lane has 32, of keys and of values; little is added to that.
    products = 2 * 32 * columns
    assert products <= roofline.count("fma", columns, 4, 4, 64).counts["fp32"] < 1.2 * products


@needs_clang
@pytest.mark.parametrize(("variant", "columns"), [("fma", 2), ("mma", 4)])
def test_twice_the_dimensions_are_twice_the_work(roofline, variant, columns):
    one, two = (roofline.count(variant, columns, 4, 4, dim) for dim in (64, 128))
    for name in ("half2", "logic"):
        assert two.counts[name] == 2 * one.counts[name]
    for chip in roofline.CHIPS:
        assert 1.7 < two.slots(chip) / one.slots(chip) < 2.0


@needs_clang
def test_every_code_is_loaded(roofline):
    codes = 16 * 64  # 8 bits of an element: its key's and its value's
    for variant in ("fma", "mma"):
        loaded = 32 * roofline.count(variant, 4, 4, 4, 64).counts["device"]
        assert codes <= loaded < 1.5 * codes


@needs_clang
def test_nothing_is_left_unclassified(roofline):
    for variant in ("fma", "mma"):
        counts = roofline.count(variant, 4, 4, 4, 64).counts
        assert counts["other"] <= 8  # branches and barriers


@needs_clang
def test_time_is_the_larger_of_memory_and_instructions(roofline):
    chip = roofline.CHIPS[0]
    time = roofline.time(chip, "fma", 4, 4, 4, 64)
    assert time.total == max(time.memory, time.compute)
    assert time.memory < roofline.bf16_time(chip, 64) / 3


def test_without_clang_it_says_so(roofline, monkeypatch):
    monkeypatch.setattr(msl, "find_clang", lambda: None)
    with pytest.raises(SystemExit, match="no clang"):
        roofline.main()
