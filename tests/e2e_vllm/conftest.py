"""The real ``vllm serve``; skipped where its environment (``make e2e-vllm``) is not."""

import importlib.util
import tempfile
from pathlib import Path

import paths  # noqa: F401 (what tests here share with others)
import pytest

INSTALLED = importlib.util.find_spec("vllm") and importlib.util.find_spec("vllm_metal_on_linux")


def pytest_collection_modifyitems(items):
    if INSTALLED:
        return
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="needs vLLM and vllm-metal: make e2e-vllm")
    for item in items:
        if here in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def model_folder():
    """The demo model as a Hugging Face folder of float32 weights."""
    import demo_folder

    with tempfile.TemporaryDirectory() as place:
        yield demo_folder.write(Path(place) / "smollm2-135m")
