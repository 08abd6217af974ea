import ctypes
import sys

import pytest

from vllm_metal_tq import cli, openblas


def test_its_absence_is_one_line_that_says_what_to_install(monkeypatch):
    def missing(*_, **__):
        raise OSError("no such library")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    complaint = openblas.preload()
    assert complaint.startswith("slow: ")
    assert "apt-get install libopenblas0-pthread" in complaint
    assert "\n" not in complaint


def test_it_is_loaded_with_global_symbols(monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: calls.append((name, mode)))
    assert openblas.preload() is None
    assert calls == [("libopenblas.so.0", ctypes.RTLD_GLOBAL)]


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_nothing_is_done_elsewhere(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: pytest.fail("loaded"))
    assert openblas.preload() is None


def test_the_command_line_passes_the_complaint_on_where_it_runs_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(openblas, "preload", lambda: "slow: because")
    for on_cpu, complaint in ((True, "slow: because\n"), (False, "")):
        monkeypatch.setattr(cli, "_on_cpu", lambda on_cpu=on_cpu: on_cpu)
        assert cli.main(["generate", "--model", "demo", "--preset", "none"]) == 2
        assert capsys.readouterr().err.startswith(complaint + "error: preset 'none' is unknown")
