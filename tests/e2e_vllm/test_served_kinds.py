"""Every kind of attention through vLLM's scheduler and vllm-metal's worker, at 8 bits.

Against vllm-metal's uncompressed cache, in spreads: see tests/integrations/mlx_lm/test_matrix.py.
"""

import pytest

pytest.importorskip("vllm_metal_on_linux", reason="needs vLLM and vllm-metal: make e2e-vllm")

import models
from kinds import KINDS
from matrix import ON, Outcome, outcome, serve
from served_models import END, PAGE, START, row
from test_matrix import BOUND, STEPS
from trained import trained

from vllm_metal_tq.integrations.mlx_lm import calibrate
from vllm_metal_tq.integrations.vllm import plugin
from vllm_metal_tq.integrations.vllm.cache import PagedCache


@pytest.fixture(autouse=True)
def registered():
    plugin.register()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_kind_is_served_as_the_documentation_says(kind):
    found = outcome(kind)
    assert row(kind, found) in PAGE.read_text(encoding="utf-8")
    if found.logits is None:
        assert not found.compressed
        return
    assert found.moved.max().item() <= BOUND
    clear, kept = found.choices
    assert clear > STEPS / 4  # else choices would say nothing
    assert kept == clear


def kind_of(name):
    (found,) = (kind for kind in KINDS if str(kind) == name)
    return found


def test_layers_that_would_write_where_they_read_are_refused():
    with pytest.raises(NotImplementedError, match="would let them write to it too"):
        serve(kind_of("gemma3n"), [0], ON)


def test_a_calibration_serves_layers_that_share_keys(tmp_path):
    kind, file = kind_of("gemma4_text with shared keys"), tmp_path / "calibration.safetensors"
    calibrate(trained(kind), models.tokens(300)[0].tolist()).save(file)
    serve(kind, [0], ON | {"calibration": str(file)})  # which refuses what does not fit


def test_an_assistant_that_reads_an_uncompressed_cache_is_refused():
    runner = serve(kind_of("llama"), [0], ON)[0].worker.model_runner
    runner.validate_paged_attention_support()
    runner._gemma4_mtp_assistant = object()
    with pytest.raises(NotImplementedError, match=r"\(MTP\) reads an uncompressed cache"):
        runner.validate_paged_attention_support()


@pytest.mark.parametrize(
    ("name", "theirs"), [("gpt_oss", set()), ("gemma4_text", {"SlidingWindowSpec"})]
)
def test_windows_keep_the_whole_context_and_in_vllm_metal_too_but_for_gemma_4(name, theirs):
    kinds = {
        setting: {type(spec).__name__ for spec in specs(kind_of(name), additional).values()}
        for setting, additional in (("theirs", {}), ("ours", ON))
    }
    assert kinds == {
        "theirs": {"FullAttentionSpec"} | theirs,
        "ours": {"TurboQuantAttentionSpec"},
    }


def specs(kind, additional):
    """What the engine hears of each layer."""
    return serve(kind, [0], additional)[0].worker.get_kv_cache_spec()


def test_the_documentation_has_no_other_kinds():
    table = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    assert len(table.strip().splitlines()) == len(KINDS) + 2


@pytest.mark.parametrize("name", ["llama", "gemma4_text with shared keys"])
def test_a_block_that_is_lost_would_show(name, monkeypatch):
    kind = kind_of(name)
    _, uncompressed = serve(kind, forced := [0] * STEPS, {})
    honest = PagedCache._page_blocks

    def twice(self, request, table):
        blocks = honest(self, request, table)
        blocks[1:2] = blocks[:1] if blocks[1:] else []
        return blocks

    monkeypatch.setattr(PagedCache, "_page_blocks", twice)
    _, ours = serve(kind, forced, ON)
    layers = len(trained(kind).layers)
    found = Outcome(layers, layers, logits=ours, uncompressed=uncompressed)
    assert found.moved.max().item() > BOUND
