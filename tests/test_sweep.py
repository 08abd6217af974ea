"""Methods side by side give what each alone gives; the frontier, the table and the plot."""

import sys

import mlx.core as mx
import pytest
from models import llama, tokens

from vllm_metal_tq import TurboQuantConfig, sweep
from vllm_metal_tq.evaluate import Quality, compressed, evaluate
from vllm_metal_tq.sweep import Point


def point(bits, kl, family="x", name="p"):
    quality = Quality(
        ppl=11.0,
        ppl_reference=10.0,
        kl_mean=kl,
        kl_p99=10 * kl,
        top1=0.9,
        bits_per_element=bits,
        tokens=5,
    )
    return Point(family, name, quality)


def test_methods_side_by_side_are_what_evaluate_gives():
    model, ids = llama(), tokens(301)[0].tolist()
    configs = [TurboQuantConfig(2, 2), TurboQuantConfig(8, 6)]
    methods = [compressed(model, config, 140, tail=False) for config in configs]
    points = sweep.measure(model, ids, methods, window=140, tokens=100)
    for found, config in zip(points, configs, strict=True):
        wanted = evaluate(model, ids, config, window=140, tokens=100, tail=False)
        assert found.quality.tokens == wanted.tokens == 100
        # Chunks end elsewhere, so sums are rounded otherwise and a few codes flip.
        assert found.kl == pytest.approx(wanted.kl_mean, rel=0.05)
        assert found.quality.ppl == pytest.approx(wanted.ppl, rel=1e-4)
        assert found.quality.top1 == pytest.approx(wanted.top1, abs=0.02)
        assert found.bits == pytest.approx(wanted.bits_per_element)


def test_the_tail_costs_bits_and_helps():
    model, ids = llama(), tokens(301)[0].tolist()
    without, with_tail = (
        compressed(model, TurboQuantConfig(2, 2), 128, tail=tail) for tail in (False, True)
    )
    assert with_tail.bits == without.bits + 16 * 32 / 128
    points = sweep.measure(model, ids, [without, with_tail], window=128, tokens=128)
    assert points[1].kl < points[0].kl


@pytest.mark.parametrize(("asked", "scored"), [(10, 10), (50, 50), (60, 60), (1000, 100)])
def test_as_many_positions_are_scored_as_asked_for(asked, scored):
    model, ids = llama(), tokens(201)[0].tolist()
    method = compressed(model, TurboQuantConfig(4, 4), 100, tail=False)
    (found,) = sweep.measure(model, ids, [method], window=100, tokens=asked)
    assert found.quality.tokens == scored


def test_no_more_is_run_than_is_scored_and_progress_ends_at_the_end():
    model, ids, seen = llama(), tokens(301)[0].tolist(), []
    method = compressed(model, TurboQuantConfig(4, 4), 300, tail=False)
    sweep.measure(
        model, ids, [method, method], window=300, tokens=20, progress=lambda *at: seen.append(at)
    )
    assert seen[-1] == (3 * 170, 3 * 170)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 2}, "window 2 must be at least 4"),
        ({"tokens": 0}, "tokens 0 at least 1"),
        ({"window": 400}, "the text has 301 tokens: a window of 400 needs 401"),
    ],
)
def test_bad_options_are_refused(options, message):
    model, ids = llama(), tokens(301)[0].tolist()
    with pytest.raises(ValueError, match=message):
        sweep.measure(model, ids, [], **options)


def test_a_model_without_layers_to_compress_is_refused():
    with pytest.raises(ValueError, match="no layer"):
        compressed(_NoLayers(), TurboQuantConfig(4, 4), 64, tail=False)


class _NoLayers:
    layers = ()

    def named_modules(self):
        return []

    def __call__(self, *_, **__):
        return mx.zeros((1, 1, 4))


def test_the_frontier_holds_what_nothing_beats():
    points = [point(4, 0.01), point(3, 0.1), point(5, 0.02), point(4, 0.02), point(6, 0.001)]
    assert [(p.bits, p.kl) for p in sweep.frontier(points)] == [(3, 0.1), (4, 0.01), (6, 0.001)]
    assert sweep.best_within(points, 5.5).kl == 0.01
    assert sweep.best_within(points, 3).kl == 0.1
    assert sweep.best_within(points, 2.9) is None


def test_the_table_is_sorted_and_marks_the_frontier():
    table = sweep.markdown([point(5, 0.02, name="b"), point(4, 0.01, name="a")]).splitlines()
    assert table[2] == "| a | 4.00 | 0.01000 | 0.1000 | +10.00 % | 90.0 % | yes |"
    assert table[3] == "| b | 5.00 | 0.02000 | 0.2000 | +10.00 % | 90.0 % |  |"


def test_the_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    sweep.draw([point(4, 0.01, sweep.OURS), point(5, 0.02)], str(file), "title")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-metal-tq\[plot\]'"):
        sweep.draw([point(4, 0.01)], str(tmp_path / "plot.png"), "title")
    assert not list(tmp_path.iterdir())
