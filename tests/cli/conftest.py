"""The command line runs in this process, on a demo model that is loaded once."""

import pytest

from vllm_metal_tq import demo_model


@pytest.fixture(autouse=True)
def loaded(demo, monkeypatch):
    monkeypatch.setattr(demo_model, "load", lambda: demo)
