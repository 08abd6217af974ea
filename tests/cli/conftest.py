"""The command line runs in this process, on a demo model that is loaded once."""

import pytest

from vllm_metal_tq import calibration, demo_model


@pytest.fixture(scope="session")
def user_cache(tmp_path_factory):
    """Takes the place of the user's cache directory; what is calibrated there stays."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def loaded(demo, user_cache, monkeypatch):
    monkeypatch.setattr(demo_model, "load", lambda *_: demo)
    monkeypatch.setattr(calibration, "user_cache_path", lambda name: user_cache / name)
