import importlib.util
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.base as base
import mlx_lm.models.cache as host
import mlx_lm.models.llama as llama_module
import pytest
from models import build, llama, tokens

from vllm_metal_tq import make_prompt_cache
from vllm_metal_tq.integrations.mlx_lm import hook, report


@pytest.fixture(autouse=True)
def unhooked():
    hook.uninstall()
    yield
    hook.uninstall()


def holders():
    """Loaded modules of mlx_lm that hold the attention function, with what they hold."""
    name = "scaled_dot_product_attention"
    modules = [m for n, m in sys.modules.items() if n.startswith("mlx_lm.models.")]
    return {m.__name__: vars(m)[name] for m in modules if name in vars(m)}


def test_uninstalled_is_as_if_never_installed():
    before = holders()
    make_prompt_cache(llama())
    assert llama_module.scaled_dot_product_attention is not hook.dense_attention
    hook.uninstall()
    assert holders() == before
    assert set(before.values()) == {hook.dense_attention}
    assert not hasattr(host, "TurboQuantKVCache")


def test_installing_twice_changes_nothing():
    model = llama()
    make_prompt_cache(model)
    once = holders()
    make_prompt_cache(model)
    assert holders() == once


def test_modules_imported_later_are_reached_and_put_back():
    make_prompt_cache(llama())
    sys.modules.pop("mlx_lm.models.qwen2", None)
    model = build("qwen2", head_dim=64, hidden_size=256)
    assert type(model).__module__ in holders()
    assert report(make_prompt_cache(model)).layers_compressed == 3
    hook.uninstall()
    assert set(holders().values()) == {hook.dense_attention}


def test_a_model_from_a_file_of_its_own_is_reached(tmp_path):
    # As mlx_lm loads a config's model_file: executed, but no entry of sys.modules.
    source = (tmp_path / "custom.py").resolve()
    text = Path(llama_module.__file__).read_text(encoding="utf-8")
    text = text.replace("from .", "from mlx_lm.models.")
    source.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("custom_model", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_model"] = module  # dataclasses look their module up while it executes
    spec.loader.exec_module(module)
    del sys.modules["custom_model"]
    model = module.Model(module.ModelArgs.from_dict(vars(llama().args)))
    cache = make_prompt_cache(model)
    model(tokens(20), cache=cache)
    mx.eval(model(tokens(1), cache=cache))
    assert report(cache).layers_compressed == 3
    hook.uninstall()
    assert module.scaled_dot_product_attention is hook.dense_attention


@pytest.mark.parametrize(
    "make",
    [
        lambda model: host.make_prompt_cache(model),
        lambda model: [host.QuantizedKVCache(group_size=64, bits=4) for _ in model.layers],
        lambda model: [host.RotatingKVCache(max_size=8) for _ in model.layers],
        lambda model: None,
    ],
)
def test_other_caches_are_left_exactly_as_they_were(make):
    model = llama()
    plain = [model(chunk, cache=cache) for cache in [make(model)] for chunk in map(tokens, (20, 1))]
    make_prompt_cache(model)
    hooked = [
        model(chunk, cache=cache) for cache in [make(model)] for chunk in map(tokens, (20, 1))
    ]
    assert all(map(mx.array_equal, plain, hooked))


def test_base_serves_modules_that_come_later():
    make_prompt_cache(llama())
    assert base.scaled_dot_product_attention is not hook.dense_attention
