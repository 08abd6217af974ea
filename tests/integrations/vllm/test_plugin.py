"""The plugin in the real vLLM: silent unless asked, and clear where it cannot serve."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

import vllm
from vllm.config import VllmConfig

from vllm_metal_tq.config import T3, TurboQuantConfig
from vllm_metal_tq.integrations.vllm import plugin
from vllm_metal_tq.integrations.vllm.settings import Settings

ON = {"turboquant": True}


@pytest.fixture(autouse=True)
def registered():
    plugin.register()
    plugin.register()  # vLLM may call it more than once


def test_vllm_finds_the_entry_point():
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    assert load_plugins_by_group(DEFAULT_PLUGINS_GROUP)["turboquant"] is plugin.register


def test_until_it_is_turned_on_nothing_heavy_is_imported():
    script = (
        "import sys; from vllm_metal_tq.integrations.vllm.plugin import register; register(); "
        "heavy = {'mlx', 'mlx_lm', 'torch', 'vllm', 'vllm_metal', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("given", [{}, {"turboquant": False}, {"other": 1}])
def test_a_configuration_that_does_not_turn_it_on_stays_as_it_is(given):
    config = VllmConfig(additional_config=dict(given))
    assert config.additional_config == given
    assert plugin.settings_of(config) is None


def test_a_mistake_is_refused_when_the_configuration_is_made():
    with pytest.raises(ValueError, match="'presets' is unknown; known keys: turboquant"):
        VllmConfig(additional_config=ON | {"presets": "tq4"})


def test_without_vllm_metal_it_says_what_is_missing():
    with pytest.raises(RuntimeError, match=r"needs vllm-metal 0\.3 or newer .* is not installed"):
        VllmConfig(additional_config=dict(ON))


def test_on_another_platform_it_says_so(monkeypatch):
    monkeypatch.setattr(plugin, "_installed", lambda name: True)
    with pytest.raises(RuntimeError, match=r"the platform of vllm-metal; this is .*Platform"):
        VllmConfig(additional_config=dict(ON))


def test_an_old_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.26.9")
    with pytest.raises(RuntimeError, match=r"needs vLLM 0\.27\.1 or newer .* this is 0\.26\.9"):
        VllmConfig(additional_config=dict(ON))


def test_a_vllm_metal_that_lacks_something_is_refused(monkeypatch):
    monkeypatch.setattr(plugin, "_installed", lambda name: True)
    monkeypatch.setattr(plugin, "_on_metal", lambda: True)
    with pytest.raises(RuntimeError, match=r"tested: 0\.3\.0\).* finds: No module named"):
        VllmConfig(additional_config=dict(ON))


@pytest.fixture
def served(monkeypatch):
    """As if vllm-metal were here."""
    monkeypatch.setattr(plugin, "_check_versions", lambda: None)
    monkeypatch.setattr(plugin, "_check_model", lambda model_config: None)
    monkeypatch.setattr(plugin, "_on_metal", lambda: True)


def test_what_is_checked_is_renamed_and_travels_with_the_configuration(served):
    import pickle

    given = ON | {"preset": "tq6", "gdn_prefill_backend": "auto"}
    config = pickle.loads(pickle.dumps(VllmConfig(additional_config=given)))
    assert config.additional_config == {
        "gdn_prefill_backend": "auto",
        plugin.OWN_KEY: ON | {"preset": "tq6"},
    }
    assert plugin.settings_of(config) == Settings(TurboQuantConfig(6, 5))


@pytest.fixture
def checked(monkeypatch):
    """Check a model by fields of its configuration, as if vllm-metal were here."""
    metal = SimpleNamespace(get_config=lambda: SimpleNamespace(use_paged_attention=True))
    monkeypatch.setitem(sys.modules, "vllm_metal", SimpleNamespace(config=metal))
    monkeypatch.setitem(sys.modules, "vllm_metal.config", metal)

    def check(**fields):
        fields = {"num_hidden_layers": 4} | fields
        config = SimpleNamespace(model="a/model", hf_text_config=SimpleNamespace(**fields))
        plugin._check_model(config)

    return check


def test_latents_are_refused_with_the_layers_that_have_them(checked):
    with pytest.raises(NotImplementedError, match=r"a/model .*\(MLA\) in layers\.0.* layers\.3"):
        checked(model_type="deepseek_v3", kv_lora_rank=512)


def test_keys_that_are_read_by_other_layers_are_served_where_the_model_says_so(checked):
    checked(model_type="gemma4_text", num_kv_shared_layers=2)
    checked(model_type="gemma3n_text", num_kv_shared_layers=0)
    with pytest.raises(NotImplementedError, match=r"a/model .* let them write to it too"):
        checked(model_type="gemma3n_text", num_kv_shared_layers=2)


def cache_config(**fields):
    defaults = {"block_size": None, "user_specified_block_size": False, "cache_dtype": "auto"}
    return SimpleNamespace(**defaults | {"kv_cache_dtype_skip_layers": []} | fields)


def prepared(cache, **given):
    config = SimpleNamespace(additional_config=given, cache_config=cache, model_config=None)
    plugin.prepare(config)
    return plugin.settings_of(config)


def test_the_engines_blocks_are_made_of_pages(served):
    own = cache_config()
    prepared(own, **ON, block_size=32)
    assert (own.block_size, own.user_specified_block_size) == (32, True)
    theirs = cache_config(block_size=64, user_specified_block_size=True)
    prepared(theirs, **ON, block_size=32)
    assert theirs.block_size == 64
    wrong = cache_config(block_size=48, user_specified_block_size=True)
    with pytest.raises(ValueError, match="--block-size 48 is no multiple of the 32 tokens"):
        prepared(wrong, **ON, block_size=32)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("turboquant_k8v4", (8, 4)),
        ("turboquant_4bit_nc", (4, 4)),
        ("turboquant_k3v4_nc", (3, 4)),
        ("turboquant_3bit_nc", (3, 3)),
    ],
)
def test_vllms_own_names_choose_the_same_widths(served, name, widths):
    cache = cache_config(cache_dtype=name, kv_cache_dtype_skip_layers=["0", "29"])
    got = prepared(cache)
    assert got == Settings(TurboQuantConfig(*widths), frozenset({0, 29}))
    assert (cache.cache_dtype, cache.kv_cache_dtype_skip_layers) == ("auto", [])


def test_a_preset_takes_precedence_over_vllms_names(served):
    assert prepared(cache_config(cache_dtype="turboquant_k8v4"), **ON, preset="tq3") == Settings(
        TurboQuantConfig(T3, T3)
    )


def test_vllms_names_are_known_to_vllm():
    from typing import get_args

    from vllm.config.cache import CacheDType

    from vllm_metal_tq.integrations.vllm.settings import CACHE_DTYPES

    known = {name for name in get_args(CacheDType) if name.startswith("turboquant_")}
    assert known == set(CACHE_DTYPES)


def test_on_other_platforms_vllms_names_are_left_to_vllm():
    cache = cache_config(cache_dtype="turboquant_k8v4")
    assert prepared(cache) is None
    assert cache.cache_dtype == "turboquant_k8v4"
