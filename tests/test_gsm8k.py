"""Problems are read, prompts are few-shot, and the final number decides."""

import json

import pytest

from vllm_metal_tq import gsm8k
from vllm_metal_tq.gsm8k import Answer, final_number


def record(number, question="How many?"):
    return json.dumps({"question": question, "answer": f"It is <<1+1=2>>2.\n#### {number}"})


def problems(tmp_path, *lines):
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(lines))
    return gsm8k.load(file)


def test_solutions_lose_their_annotations(tmp_path):
    (problem,) = problems(tmp_path, record("1,234"), "")
    assert (problem.question, problem.solution, problem.number) == ("How many?", "It is 2.", 1234)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not an object with 'question' and 'answer'"),
        ("[1]", "line 2: not an object"),
        ('{"question": "a"}', "line 2: not an object"),
        ('{"question": "a", "answer": 5}', "line 2: not an object"),
        ('{"question": "a", "answer": "five"}', "line 2: the answer does not end in '#### '"),
        ('{"question": 5, "answer": "#### 5"}', "line 2: not an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        problems(tmp_path, record(1), line)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        gsm8k.load(file)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.\n#### 7", 7),
        ("#### $1,250.50 in all, not 9", 1250.5),
        ("He has 3 apples, then -4.", -4),
        ("a total of 12,000.", 12000),
        ("no idea", None),
        ("12 ####", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


class Words:
    """A tokenizer that leaves the text as it is."""

    def encode(self, text):
        return text


def test_examples_come_first_and_both_caches_answer(tmp_path, monkeypatch):
    prompts, progress = [], []

    def complete(model, tokenizer, prompt, caches, max_tokens, stop):
        prompts.append(prompt)
        assert (max_tokens, stop) == (64, "\n\nQuestion:")
        return "#### 2" if caches == "compressed" else "\n#### 3"

    monkeypatch.setattr(gsm8k, "complete", complete)
    monkeypatch.setattr(gsm8k, "make_dense_cache", lambda model: "dense")
    found = problems(tmp_path, record(1, "A?"), record(2, "B?"), record(3, "C?"), record(4, "D?"))
    answers = gsm8k.solve(
        None,
        Words(),
        found,
        lambda model: "compressed",
        questions=2,
        shots=1,
        max_tokens=64,
        progress=lambda *at: progress.append(at),
    )
    start = "Question: A?\nAnswer: It is 2.\n#### 1\n\nQuestion: "
    assert prompts == [start + "B?\nAnswer:"] * 2 + [start + "C?\nAnswer:"] * 2
    assert progress == [(i, 4) for i in range(1, 5)]
    assert gsm8k.summary(answers) == {
        "accuracy": 0.5,
        "accuracy_reference": 0.5,
        "same_number": 0,
        "same_text": 0,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": 0}, "questions 0 .* must be at least 1"),
        ({"max_tokens": 0}, "max_tokens 0 must be at least 1"),
        ({"shots": -1}, "shots -1 at least 0"),
        ({"shots": 2}, "2 problems are too few: 2 serve as examples"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    found = problems(tmp_path, record(1), record(2))
    with pytest.raises(ValueError, match=message):
        gsm8k.solve(None, Words(), found, None, **options)


def test_no_answer_is_not_right_but_is_the_same():
    answers = [Answer(4.0, None, None, True), Answer(4.0, 4.0, None, False)]
    assert gsm8k.summary(answers)["accuracy"] == 0.5
    assert gsm8k.summary(answers)["accuracy_reference"] == 0
    assert gsm8k.summary(answers)["same_number"] == 0.5
