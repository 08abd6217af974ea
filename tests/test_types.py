"""That the type checker would notice: the configuration is the one that ``make lint`` runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

MISTAKES = """\
def untyped(bits): ...

def vague(bits: list) -> None: ...

bits: int = "4"
"""


def test_mistakes_in_types_are_found(tmp_path):
    file = tmp_path / "mistakes.py"
    file.write_text(MISTAKES)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {line.split("[")[-1] for line in done.stdout.splitlines() if str(file) in line}
    assert found == {"no-untyped-def]", "type-arg]", "assignment]"}, done.stdout + done.stderr
    assert done.returncode == 1
