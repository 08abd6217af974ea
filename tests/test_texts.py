"""The shipped texts: what calibration sees is not what evaluation scores."""

import re
from importlib.resources import files


def sequences(name: str, words: int) -> set[tuple[str, ...]]:
    """All runs of so many words of a shipped text."""
    text = (files("vllm_metal_tq") / "data" / name).read_text(encoding="utf-8")
    found = re.findall(r"[a-z']+", text.lower())
    return set(zip(*(found[i:] for i in range(words)), strict=False))


def test_the_calibration_text_shares_no_phrase_with_the_evaluated_one():
    assert len(sequences("calibration.txt", 6)) > 500
    assert not sequences("calibration.txt", 6) & sequences("alice.txt", 6)
