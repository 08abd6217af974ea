"""The command line runs in this process, on a demo model that is loaded once."""

from contextlib import contextmanager

import pytest

from vllm_metal_tq import calibration, demo_model
from vllm_metal_tq.cli import common


@pytest.fixture(scope="session")
def user_cache(tmp_path_factory):
    """Takes the place of the user's cache directory; what is calibrated there stays."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def loaded(demo, user_cache, monkeypatch):
    monkeypatch.setattr(demo_model, "load", lambda *_: demo)
    monkeypatch.setattr(calibration, "user_cache_path", lambda name: user_cache / name)


@pytest.fixture
def bars(monkeypatch):
    """Label -> what its progress bar is told, in place of showing it."""
    told = {}

    @contextmanager
    def progress_bar(label, count=None):
        calls = told.setdefault(label, [])
        yield lambda done, total: calls.append((done, total))

    monkeypatch.setattr(common, "progress_bar", progress_bar)
    return told
