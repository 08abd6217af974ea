"""A few cases of every fuzzing target, always the same ones; ``make fuzz`` has 20,000 others."""

import harness
import pytest
import run
from hypothesis import strategies as st

COUNT = 40
TARGETS = run.targets()


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_a_target_takes_or_refuses_what_comes(target):
    try:
        came = harness.run(target, COUNT)
    finally:
        target.close()
    assert came.total() >= COUNT


def test_make_fuzz_has_20_000_cases():
    assert sum(target.count for target in TARGETS) >= 20_000


def faulty(check):
    return harness.Target("faulty", 100, st.integers(0, 1000), check)


class TestTheHarness:
    """Whatever may not come of a case is found."""

    def test_an_error_that_is_not_documented(self):
        def check(case):
            try:
                return str({}[case] if case > 900 else case)
            except Exception as error:
                return harness.refusal(error)

        with pytest.raises(harness.Finding, match="KeyError is no documented error: 901"):
            harness.run(faulty(check), 100)

    def test_an_error_that_says_nothing(self):
        with pytest.raises(harness.Finding, match="says nothing"):
            harness.refusal(ValueError("  "))

    def test_memory_asked_for_before_the_refusal(self):
        error = ValueError("no such size")
        error.__cause__ = RuntimeError("[malloc] Unable to allocate 4000000000000 bytes")
        with pytest.raises(harness.Finding, match="memory was asked for"):
            harness.refusal(error)

    def test_a_case_that_takes_too_long(self, monkeypatch):
        monkeypatch.setattr(harness, "SECONDS", 0.2)

        def check(case):
            while True:
                pass

        with pytest.raises(harness.Finding, match="longer than"):
            harness.limited(check)(1)

    def test_a_case_that_takes_too_much_memory(self, monkeypatch):
        monkeypatch.setattr(harness, "GROWTH", -1)
        with pytest.raises(harness.Finding, match="MiB of memory"):
            harness.limited(str)(1)


class TestTheRun:
    """Processes that die or hang are found as well, with the case at which they did."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(run, "FINDINGS", tmp_path)
        return tmp_path

    def supervised(self, monkeypatch, tmp_path, code):
        program = tmp_path / "work.py"
        program.write_text("import os, sys, time\nfile = sys.argv[-1]\n" + code)
        monkeypatch.setattr(run, "__file__", str(program))
        return run.supervise(faulty(str), 1, 7)

    def test_a_process_that_dies(self, monkeypatch, folder):
        code = "open(file, 'w').write('5')\nos.abort()\n"
        _, _, found = self.supervised(monkeypatch, folder, code)
        assert found.startswith("died of signal 6")
        assert (folder / "faulty-7.txt").read_text() == "5"

    def test_a_process_that_hangs(self, monkeypatch, folder):
        monkeypatch.setattr(run, "SILENCE", 1)
        code = "open(file, 'w').write('6')\ntime.sleep(60)\n"
        _, seconds, found = self.supervised(monkeypatch, folder, code)
        assert found.startswith("hung")
        assert seconds < 30
        assert (folder / "faulty-7.txt").read_text() == "6"

    def test_a_finding(self, monkeypatch, folder):
        code = "open(file, 'w').write('7')\nraise SystemExit('Finding: this and that')\n"
        _, _, found = self.supervised(monkeypatch, folder, code)
        assert found.startswith("Finding: this and that")
        assert (folder / "faulty-7.log").exists()

    def test_nothing(self, monkeypatch, folder):
        came, _, found = self.supervised(monkeypatch, folder, "print('{\"taken\": 3}')\n")
        assert (came.total(), found) == (3, "")
        assert [file.name for file in folder.iterdir()] == ["work.py"]
