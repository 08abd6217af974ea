"""The audit fails on findings, and says so when it could not look."""

import json
import subprocess
import sys
from types import SimpleNamespace

import audit
import pytest

SAFE = {"name": "mlx", "version": "0.32.4", "vulns": []}
FOUND = {
    "name": "jinja2",
    "version": "2.10",
    "vulns": [
        {"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"]},
        {"id": "PYSEC-X", "fix_versions": []},
    ],
}
MISSED = {"name": "numpy", "version": "9", "skip_reason": "Dependency not found on PyPI"}
OURS = {"name": "vllm-metal-tq", "skip_reason": "distribution marked as editable"}


@pytest.fixture
def says(monkeypatch):
    """A function that sets what pip-audit prints."""

    def set_output(output="", errors=""):
        ended = SimpleNamespace(stdout=output, stderr=errors, returncode=1)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)

    return set_output


@pytest.mark.parametrize(
    ("packages", "status", "words"),
    [
        ([SAFE], 0, ["1 packages, no known vulnerability"]),
        ([SAFE, OURS], 0, ["1 packages"]),
        ([SAFE, FOUND], 1, ["jinja2 2.10: PYSEC-2019-217, fixed in 2.10.1", "in no version"]),
        ([SAFE, MISSED], 2, ["1 of 2 packages could not be looked up", "not found on PyPI"]),
        ([FOUND, MISSED], 1, ["PYSEC-2019-217", "could not be looked up"]),
    ],
)
def test_status_and_words(says, capsys, packages, status, words):
    says(json.dumps({"dependencies": packages, "fixes": []}))
    assert audit.main() == status
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed


@pytest.mark.parametrize("output", ["", "{}", "[]"])
def test_without_a_network_nothing_is_known(says, capsys, output):
    says(output, "Traceback\nConnectionError: no route to host\n")
    assert audit.main() == audit.UNKNOWN
    assert "pip-audit failed: ConnectionError: no route" in capsys.readouterr().out


def test_the_real_pip_audit_takes_the_flags():
    command = [sys.executable, *audit.COMMAND, "--dry-run"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert "usage:" not in ended.stderr
    assert "unrecognized" not in ended.stderr
    assert ended.returncode == 0, ended.stderr


def test_licences_are_listed(says, capsys):
    says(json.dumps({"dependencies": []}))
    audit.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("mlx 0.") and line.endswith("MIT") for line in lines)
    assert any(line.startswith("numpy ") and "BSD" in line for line in lines)
