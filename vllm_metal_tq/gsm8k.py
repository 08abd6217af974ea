"""Grade-school word problems (GSM8K, arXiv:2110.14168): the final number must be right.

The prompt is few-shot: the file's first problems with their solutions, then the question. Both
caches answer the same prompts greedily.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache as make_dense_cache

from .completion import complete
from .types import MakeCaches, Progress, Tokenizer

STOP = "\n\nQuestion:"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CALCULATOR = re.compile(r"<<.*?>>")  # the data set's annotations for tools


@dataclass(frozen=True)
class Problem:
    """A question, its solution without annotations, and the final number."""

    question: str
    solution: str
    number: float


@dataclass(frozen=True)
class Answer:
    """What was answered to one problem.

    Attributes:
        wanted: the right number.
        number: the number answered with the compressed cache, None where there was none.
        number_reference: likewise with the uncompressed one.
        same_text: whether both caches gave the same text.
    """

    wanted: float
    number: float | None
    number_reference: float | None
    same_text: bool

    @property
    def right(self) -> bool:
        """Whether the compressed cache's number is right."""
        return self.number == self.wanted

    @property
    def right_reference(self) -> bool:
        """Whether the uncompressed cache's number is right."""
        return self.number_reference == self.wanted


def load(file: str | Path) -> list[Problem]:
    """Read problems, a JSON object with ``question`` and ``answer`` on each line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or a line is no such object; the message names the line.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"problems {str(file)!r} are not UTF-8: {error}") from error
    return [
        _problem(line, f"problems {str(file)!r}, line {i}")
        for i, line in enumerate(lines, 1)
        if line.strip()
    ]


def _problem(line: str, where: str) -> Problem:
    try:
        record = json.loads(line)
        question, answer = record["question"].strip(), record["answer"]
        solution, _, final = answer.partition("####")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not an object with 'question' and 'answer'") from error
    number = final_number("####" + final)
    if number is None:
        raise ValueError(f"{where}: the answer does not end in '#### ' and a number")
    return Problem(question, _CALCULATOR.sub("", solution).strip(), number)


def final_number(text: str) -> float | None:
    """The number after ``####`` where the text has that, else its last number, else None."""
    _, marked, final = text.partition("####")
    numbers = _NUMBER.findall(final) if marked else _NUMBER.findall(text)[-1:]
    return float(numbers[0].replace(",", "")) if numbers else None


def solve(
    model: nn.Module,
    tokenizer: Tokenizer,
    problems: list[Problem],
    caches: MakeCaches,
    *,
    questions: int = 20,
    shots: int = 5,
    max_tokens: int = 256,
    progress: Progress = lambda done, total: None,
) -> list[Answer]:
    """Ask ``questions`` problems, after ``shots`` others as examples.

    Args:
        model: a model that mlx_lm has loaded.
        tokenizer: its tokenizer.
        problems: the first ``shots`` are examples, the next ``questions`` are asked.
        caches: from the model to an empty compressed prompt cache.
        questions: how many to ask; fewer are where there are fewer problems.
        shots: how many examples.
        max_tokens: tokens of an answer, at most.
        progress: called with answers had and answers in all.

    Raises:
        ValueError: a number is out of range, or there are no more problems than examples.
    """
    if questions < 1 or shots < 0 or max_tokens < 1:
        raise ValueError(
            f"questions {questions} and max_tokens {max_tokens} must be at least 1, "
            f"shots {shots} at least 0"
        )
    if len(problems) <= shots:
        raise ValueError(f"{len(problems)} problems are too few: {shots} serve as examples")
    examples = "".join(
        f"{_asked(problem)} {problem.solution}\n#### {problem.number:g}\n\n"
        for problem in problems[:shots]
    )
    asked = problems[shots : shots + questions]
    answers = []
    for i, problem in enumerate(asked):
        prompt = tokenizer.encode(examples + _asked(problem))
        texts = []
        for make in (caches, make_dense_cache):
            texts.append(complete(model, tokenizer, prompt, make(model), max_tokens, STOP))
            progress(len(texts) + 2 * i, 2 * len(asked))
        ours, theirs = texts
        numbers = final_number(ours), final_number(theirs)
        answers.append(Answer(problem.number, *numbers, same_text=ours == theirs))
    return answers


def _asked(problem: Problem) -> str:
    return f"Question: {problem.question}\nAnswer:"


def summary(answers: list[Answer]) -> dict[str, float]:
    """Shares of all questions.

    Returns:
        ``accuracy`` and ``accuracy_reference``; ``same_number``, how often both caches answered
        the same number, right or not; ``same_text``.
    """
    count = len(answers)
    return {
        "accuracy": sum(a.right for a in answers) / count,
        "accuracy_reference": sum(a.right_reference for a in answers) / count,
        "same_number": sum(a.number == a.number_reference for a in answers) / count,
        "same_text": sum(a.same_text for a in answers) / count,
    }
