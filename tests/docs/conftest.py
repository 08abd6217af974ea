"""The documentation as a site, built once."""

import subprocess
import sys

import pytest
from blocks import ROOT


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """What ``mkdocs build --strict`` left, and the finished process."""
    pytest.importorskip("material", reason="needs mkdocs-material: pip install '.[docs]'")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return site, subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
