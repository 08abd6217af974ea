"""Retrieval: a fact is hidden in a text at several depths, and the model is asked to finish it.

The fact is a number that occurs nowhere else; the question is the fact's own beginning, which a
small model that follows no instructions can still continue. Both caches answer the same prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache as make_dense_cache

from .completion import complete
from .types import MakeCaches, Progress, Tokenizer

FACT = "\n\nThe secret number of {city} is {number}.\n\n"
QUESTION = (
    "\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is"
)
CITIES = ("Berlin", "Lima", "Cairo", "Oslo", "Delhi", "Quito", "Paris", "Seoul", "Rome", "Kyiv")
ANSWER_TOKENS = 16
SENTENCE_ENDS = (".", "!", "?", "\n")


@dataclass(frozen=True)
class Trial:
    """One depth.

    Attributes:
        depth: where the fact stands in the text, from 0 (its beginning) to 1.
        number: what was to be found.
        answer: what the model said with the compressed cache.
        answer_reference: what it said with the uncompressed one.
    """

    depth: float
    number: str
    answer: str
    answer_reference: str

    @property
    def found(self) -> bool:
        """Whether the number was found with the compressed cache."""
        return self.number in self.answer

    @property
    def found_reference(self) -> bool:
        """Whether the number was found with the uncompressed cache."""
        return self.number in self.answer_reference


def retrieve(
    model: nn.Module,
    tokenizer: Tokenizer,
    token_ids: list[int],
    caches: MakeCaches,
    *,
    context: int = 1024,
    depths: int = 10,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[Trial]:
    """Ask once for each depth.

    Args:
        model: a model that mlx_lm has loaded.
        tokenizer: its tokenizer.
        token_ids: the text to hide facts in, from its beginning.
        caches: from the model to an empty compressed prompt cache.
        context: tokens of a prompt, the fact and the question included.
        depths: how many depths, from the text's beginning to its end.
        seed: of the numbers.
        progress: called with answers had and answers in all.

    Raises:
        ValueError: ``context`` is too short for the fact and the question, the text too short for
            the context, or there is no depth.
    """
    if depths < 1:
        raise ValueError(f"depths {depths} must be at least 1")
    numbers = np.random.default_rng(seed).choice(90_000, depths, replace=False) + 10_000
    trials = []
    for i, number in enumerate(map(str, numbers)):
        depth = i / max(depths - 1, 1)
        city = CITIES[i % len(CITIES)]
        prompt = hide(tokenizer, token_ids, city, number, context, depth)
        answers = []
        for make in (caches, make_dense_cache):
            answers.append(complete(model, tokenizer, prompt, make(model), ANSWER_TOKENS))
            progress(len(answers) + 2 * i, 2 * depths)
        trials.append(Trial(depth, number, *answers))
    return trials


def hide(
    tokenizer: Tokenizer,
    token_ids: list[int],
    city: str,
    number: str,
    context: int,
    depth: float,
) -> list[int]:
    """A prompt of ``context`` tokens: the text with the fact after a sentence, and the question."""
    fact = tokenizer.encode(FACT.format(city=city, number=number), add_special_tokens=False)
    question = tokenizer.encode(QUESTION.format(city=city), add_special_tokens=False)
    room = context - len(fact) - len(question)
    if room < 1:
        raise ValueError(
            f"a context of {context} tokens is too short: "
            f"fact and question take {len(fact) + len(question)}"
        )
    if len(token_ids) < room:
        raise ValueError(f"the text has {len(token_ids)} tokens: this context needs {room}")
    text = token_ids[:room]
    ends = [
        i + 1 for i, token in enumerate(text) if tokenizer.decode([token]).endswith(SENTENCE_ENDS)
    ]
    at = min([0, room, *ends], key=lambda end: abs(end - depth * room))
    return text[:at] + fact + text[at:] + question


def markdown(trials: list[Trial]) -> str:
    """A Markdown table, a row each depth."""
    lines = ["| depth | number | compressed | uncompressed |", "|---|---|---|---|"]
    for trial in trials:
        marks = ["found" if x else "-" for x in (trial.found, trial.found_reference)]
        lines.append(f"| {100 * trial.depth:.0f} % | {trial.number} | {' | '.join(marks)} |")
    found, reference = (
        f"{sum(x)} of {len(trials)}"
        for x in ([t.found for t in trials], [t.found_reference for t in trials])
    )
    lines.append(f"| all | | {found} | {reference} |")
    return "\n".join(lines) + "\n"
