"""Where facts are hidden, what counts as found, and that the demo model finds them."""

from importlib.resources import files

import pytest

from vllm_metal_tq import TurboQuantConfig, needle
from vllm_metal_tq.evaluate import compressed
from vllm_metal_tq.needle import Trial


class Letters:
    """A tokenizer of letters."""

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return list(map(ord, text))

    def decode(self, ids):
        return "".join(map(chr, ids))


TEXT = list(map(ord, "Once upon a time. There was a king! Was he good? He was.\nThe end " * 20))


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_fact_stands_after_a_sentence_near_its_depth(depth):
    prompt = needle.hide(Letters(), TEXT, "Lima", "12345", 600, depth)
    text = Letters().decode(prompt)
    assert len(prompt) == 600
    fact = needle.FACT.format(city="Lima", number="12345")
    question = needle.QUESTION.format(city="Lima")
    assert text.endswith(question)
    assert text.count("12345") == 1
    before, after = text.removesuffix(question).split(fact)
    assert Letters().decode(TEXT).startswith(before + after)
    assert not before or before.endswith(needle.SENTENCE_ENDS) or not after
    assert len(before) == pytest.approx(depth * len(before + after), abs=15)


@pytest.mark.parametrize(
    ("context", "text", "message"),
    [
        (100, TEXT, "a context of 100 tokens is too short: fact and question take 1"),
        (600, TEXT[:20], "the text has 20 tokens: this context needs 4"),
    ],
)
def test_what_does_not_fit_is_refused(context, text, message):
    with pytest.raises(ValueError, match=message):
        needle.hide(Letters(), text, "Lima", "12345", context, 0.5)


def test_both_caches_are_asked_at_every_depth(monkeypatch):
    seen, progress = [], []

    def complete(model, tokenizer, prompt, caches, max_tokens):
        text = tokenizer.decode(prompt)
        seen.append((text, caches))
        number = text.split(" is ")[1][:5]
        return f" {number}." if caches == "compressed" else " unknown"

    monkeypatch.setattr(needle, "complete", complete)
    monkeypatch.setattr(needle, "make_dense_cache", lambda model: "dense")
    trials = needle.retrieve(
        None,
        Letters(),
        TEXT,
        lambda model: "compressed",
        context=600,
        depths=3,
        progress=lambda *at: progress.append(at),
    )
    assert [trial.depth for trial in trials] == [0, 0.5, 1]
    assert all(trial.found and not trial.found_reference for trial in trials)
    assert len({trial.number for trial in trials}) == 3
    assert [caches for _, caches in seen] == ["compressed", "dense"] * 3
    assert [a for a, _ in seen[::2]] == [b for b, _ in seen[1::2]]
    assert progress == [(i, 6) for i in range(1, 7)]


def test_no_depth_is_refused():
    with pytest.raises(ValueError, match="depths 0 must be at least 1"):
        needle.retrieve(None, Letters(), TEXT, None, depths=0)


def test_the_table_counts():
    trials = [Trial(0, "12345", " 12345.", " 12345."), Trial(1, "99999", " 9999", " 99999")]
    table = needle.markdown(trials).splitlines()
    assert table[2:] == [
        "| 0 % | 12345 | found | found |",
        "| 100 % | 99999 | - | found |",
        "| all | | 1 of 2 | 2 of 2 |",
    ]


@pytest.mark.slow
def test_the_demo_model_finds_facts_with_either_cache(demo):
    model, tokenizer = demo
    text = (files("vllm_metal_tq") / "data" / "alice.txt").read_text(encoding="utf-8")
    method = compressed(model, TurboQuantConfig(8, 6), 512)
    ids = tokenizer.encode(text)
    trials = needle.retrieve(model, tokenizer, ids, method.caches, context=512, depths=3)
    assert all(trial.found_reference and trial.found for trial in trials)
