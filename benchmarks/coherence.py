"""Greedy answers of the demo model to five prompts of over 200 tokens, for every preset.

Prints each text, how many of its tokens agree with the uncompressed answer before the first
difference, and how varied it is (distinct 4-grams over all: a text stuck in a loop nears 0).

    python benchmarks/coherence.py [--max-tokens 220] [--presets tq4 tq2]
"""

import argparse

from vllm_metal_tq import openblas

openblas.preload()

from importlib.resources import files  # noqa: E402

from mlx_lm import stream_generate  # noqa: E402

from vllm_metal_tq import TurboQuantConfig, demo_model, make_prompt_cache  # noqa: E402
from vllm_metal_tq.config import PRESETS  # noqa: E402

TASKS = (
    "Retell this passage in your own words.",
    "Describe every person in this passage and what they do.",
    "What happens in this passage? Explain it to a child.",
    "Continue this story with a scene of your own.",
    "List the events of this passage in order, and say why each one happens.",
)
PASSAGE = 1200  # characters


def prompts(tokenizer) -> list[list[int]]:
    text = (files("vllm_metal_tq") / "data" / "alice.txt").read_text(encoding="utf-8")
    for i, task in enumerate(TASKS):
        passage = text[2000 + 4000 * i :][:PASSAGE]
        messages = [{"role": "user", "content": f"{task}\n\n{passage}"}]
        yield tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def answer(model, tokenizer, prompt, **options):
    responses = list(stream_generate(model, tokenizer, prompt, **options))
    return [r.token for r in responses], "".join(r.text for r in responses)


def variety(tokens: list[int]) -> float:
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return len(set(grams)) / max(len(grams), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-tokens", type=int, default=220)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    args = parser.parse_args()
    model, tokenizer = demo_model.load()
    for prompt in prompts(tokenizer):
        print(f"\n## prompt of {len(prompt)} tokens: {tokenizer.decode(prompt)[-600:]!r}")
        reference = None
        for preset in (None, *args.presets):
            config = preset and TurboQuantConfig.from_names(preset)
            cache = make_prompt_cache(model, config) if config else None
            options = {"max_tokens": args.max_tokens, "prompt_cache": cache}
            tokens, text = answer(model, tokenizer, prompt, **options)
            reference = reference or tokens
            pairs = enumerate(zip(tokens, reference, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), len(tokens))
            print(f"\n### {preset or 'uncompressed'}: {len(tokens)} tokens")
            print(f"first {same} agree, variety {variety(tokens):.2f}\n{text}", flush=True)


if __name__ == "__main__":
    main()
