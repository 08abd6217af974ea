"""Every module of mlx_lm is a kind of the matrix, attends like one, or says why it cannot run."""

import importlib.util
import pkgutil
from pathlib import Path

import mlx_lm.models
import pytest
from alike import ALIKE, NOT_RUN
from kinds import KINDS, NAMED
from models import build

from vllm_metal_tq.integrations.mlx_lm import hook
from vllm_metal_tq.integrations.mlx_lm.probe import STATE, attention

OF_KINDS = {kind.model_type for kind in KINDS}
ROWS = [(kind, name) for kind, modules in ALIKE.items() for name in modules]


def has_model(name):
    """Whether a module of mlx_lm defines a model; without importing it, which one refuses."""
    spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
    text = Path(spec.origin).read_text(encoding="utf-8")
    return "class Model(" in text or "class Model:" in text


def test_no_module_is_left_out():
    every = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    shipped = set(filter(has_model, every)) | (every & OF_KINDS)
    assert shipped - OF_KINDS - {name for _, name in ROWS} - set(NOT_RUN) == set()


def test_no_module_is_named_twice():
    names = [name for _, name in ROWS] + list(OF_KINDS) + list(NOT_RUN)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("kind", "name"), ROWS, ids=[name for _, name in ROWS])
def test_its_layers_are_found_to_be_those_of_the_kind(kind, name):
    if importlib.util.find_spec(f"mlx_lm.models.{name}") is None:
        pytest.skip(f"this mlx_lm has no {name}")
    model = build(name, **ALIKE[kind][name])
    hook.install(model)
    found = {x if isinstance(x, str) else x.reader.value for x in attention(model)}
    assert found
    assert found - {STATE} == set(NAMED[kind].caches) - {STATE}
