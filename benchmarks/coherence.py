"""Greedy answers of the demo model to five prompts of over 200 tokens, for every preset.

Prints each text, how many of its tokens agree with the uncompressed answer before the first
difference, and how varied it is (distinct 4-grams over all: a text stuck in a loop nears 0).

    python benchmarks/coherence.py [--max-tokens 220] [--presets tq4 tq2]
"""

import argparse

from vllm_metal_tq import openblas

openblas.preload()

import shipped  # noqa: E402
from mlx_lm import stream_generate  # noqa: E402

from vllm_metal_tq import TurboQuantConfig, demo_model, make_prompt_cache  # noqa: E402
from vllm_metal_tq.config import PRESETS  # noqa: E402

# A question, the answer it got, and the question to answer now.
CHATS = (
    (
        "What is photosynthesis?",
        """Photosynthesis is the process by which plants, algae and some bacteria turn light into
chemical energy. It takes place in the chloroplasts of the leaf, where a green pigment
called chlorophyll absorbs sunlight. The plant takes in carbon dioxide from the air
through small openings in its leaves, and water from the soil through its roots. With
the energy of the light it splits the water, sets oxygen free, and builds sugar out of
the carbon dioxide. The sugar feeds the plant: some of it is used at once, some is
stored as starch, and some becomes cellulose, of which the walls of its cells are made.
Almost all life on Earth depends on this process, because it produces both the food that
animals eat and the oxygen that they breathe. It also removes carbon dioxide from the
air, which is one of the reasons why forests matter for the climate.""",
        "How do plants get water from the soil to their leaves? Explain it step by step.",
    ),
    (
        "I would like to sleep better. What can I do?",
        """Good sleep begins long before you go to bed. First, keep regular hours: get up at the
same time every day, even on weekends, so that your body knows when to be tired. Second,
get daylight in the morning and some exercise during the day, but not in the last two
hours before bedtime. Third, be careful with coffee and tea in the afternoon, because
caffeine stays in the blood for many hours, and do not drink alcohol late in the
evening, because it makes sleep shallow. Fourth, make the bedroom dark, quiet and cool,
and leave the telephone in another room. If you cannot fall asleep after twenty minutes,
get up, read something calm under a dim light, and go back to bed when you feel sleepy.
Finally, do not worry about a single bad night: it happens to everybody, and the body
makes up for it.""",
        "What are the benefits of regular exercise? Give me five of them and explain each one.",
    ),
    (
        "Can you tell me about the Roman Empire?",
        """The Roman Empire began in 27 BC, when Octavian received the title Augustus and became
the first emperor. At its greatest extent, under Trajan in the year 117, it reached from
Britain to Mesopotamia and from the Rhine to the Sahara. Its people built roads, bridges
and aqueducts, many of which still stand, and its law became the model for much of
Europe. Latin, the language of Rome, lives on in Italian, French, Spanish, Portuguese
and Romanian. For two centuries the empire was mostly at peace, and trade flourished
around the Mediterranean. In the third century it was shaken by civil wars, inflation
and attacks from outside. Diocletian divided its administration into an eastern and a
western half. The western half came to an end in 476, while the eastern half, with its
capital Constantinople, lasted for almost another thousand years.""",
        "Why did the western half of the empire fall? Give me five reasons and explain each one.",
    ),
    (
        "Please write the beginning of a story about a lighthouse.",
        """The lighthouse stood at the end of a long spit of sand, and for thirty years the same
man had lived in it. Every evening he climbed the hundred and forty steps to the lamp,
and every morning he climbed down again, made tea, and wrote one line in a book: the
wind, the waves, the ships that had passed. In all that time he had never missed a line.
Then one morning in November, when the fog was so thick that he could not see his own
boots, he opened the door and found a small wooden boat on the sand, with no oars and no
name, and in it a girl of about ten years, fast asleep under a sail. She had a brass key
on a string around her neck. He carried her inside, put her by the stove, and wrote in
his book: fog, no wind, no ships, one visitor. When she woke up, she looked at the
stairs and asked him whether the lamp was still burning.""",
        "How does one write a good story? Give me five tips and explain each one.",
    ),
    (
        "What should I know before I adopt a dog?",
        """A dog is a friend for ten to fifteen years, so it is good to think it over. A dog needs
time: at least two walks a day in any weather, play, training, and company, because dogs
do not like to be alone for long. It also costs money: food, a bed, a leash,
vaccinations, insurance and visits to the vet. Ask yourself who will look after it when
you are ill or on holiday, and whether your landlord allows pets. Then think about the
kind of dog. A young dog has to be taught everything, while an older one from a shelter
often knows how to live in a house and is grateful for a quiet home. Large dogs need
space, and working breeds need a task. Visit the dog several times before you decide,
take the whole family along, and ask the people of the shelter what it is like with
children, with cats and with strangers.""",
        "How do I train a young dog? Give me five tips and explain each one.",
    ),
)


def prompts(tokenizer) -> list[list[int]]:
    """The chats as token ids, over 200 each."""
    roles = ("user", "assistant", "user")
    for chat in CHATS:
        turns = [
            {"role": role, "content": text.replace("\n", " ")}
            for role, text in zip(roles, chat, strict=True)
        ]
        yield tokenizer.apply_chat_template(turns, add_generation_prompt=True)


def answer(model, tokenizer, prompt, **options):
    responses = list(stream_generate(model, tokenizer, prompt, **options))
    return [r.token for r in responses], "".join(r.text for r in responses)


def variety(tokens: list[int]) -> float:
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return len(set(grams)) / max(len(grams), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-tokens", type=int, default=220)
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=list(PRESETS))
    args = parser.parse_args()
    model, tokenizer = demo_model.load()
    calibration = shipped.calibration(model, tokenizer)
    for number, prompt in enumerate(prompts(tokenizer), 1):
        print(f"\n## prompt {number}, {len(prompt)} tokens")
        reference = None
        for preset in (None, *args.presets):
            config = preset and TurboQuantConfig.from_names(preset)
            cache = make_prompt_cache(model, config, calibration=calibration) if config else None
            options = {"max_tokens": args.max_tokens, "prompt_cache": cache}
            tokens, text = answer(model, tokenizer, prompt, **options)
            reference = reference or tokens
            pairs = enumerate(zip(tokens, reference, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), len(tokens))
            print(f"\n### {preset or 'uncompressed'}: {len(tokens)} tokens")
            print(f"first {same} agree, variety {variety(tokens):.2f}\n{text}", flush=True)


if __name__ == "__main__":
    main()
