"""Greedy answers of the demo model to five prompts of over 200 tokens, for every preset.

Prints each text, how many of its tokens agree with the uncompressed answer before the first
difference, and how varied it is (distinct 4-grams over all: a text stuck in a loop nears 0).

    python benchmarks/coherence.py [--max-tokens 220] [--presets tq4 tq2]
"""

import argparse

from vllm_metal_tq import openblas

openblas.preload()

from mlx_lm import stream_generate  # noqa: E402

from vllm_metal_tq import TurboQuantConfig, demo_model, make_prompt_cache  # noqa: E402
from vllm_metal_tq.config import PRESETS  # noqa: E402

PROMPTS = (
    """I have a small garden behind my house. It gets sun in the morning and shade after two
o'clock. The soil is heavy and holds water for days after it rains. Last year I planted tomatoes
along the fence, but they stayed small and many of them rotted before they were ripe. The beans
did better, and the mint grew so well that it took over a whole corner. I have about four hours a
week for the garden, mostly on Saturday mornings, and I do not want to spend much money. I own a
spade, a watering can and a wheelbarrow, and my neighbour has offered me as much compost as I can
carry. My daughter, who is seven, would like to grow something that she can eat straight from the
plant, and my wife would like flowers that can be cut and put on the kitchen table. We live in a
place where the last frost comes at the end of April and the first one in the middle of October.
Please write me a plan for the year: what should I plant, where should I plant it, and what should
I do first?""",
    """The following is a note from the manager of a small library. "Dear all, from the first of
March the library will be open from nine in the morning until seven in the evening on weekdays,
and from ten until four on Saturdays. On Sundays we stay closed. Books can be borrowed for four
weeks and can be renewed twice, unless somebody else is waiting for them. Films and games can be
borrowed for one week and cannot be renewed. Children under twelve need the signature of a parent
on their card. If you bring a book back late, please put something in the box by the door; we no
longer send out fines. The room upstairs can be booked by reading groups, language classes and
anybody else who needs a quiet table, free of charge, for up to three hours at a time. We are
looking for people who can read to children on Wednesday afternoons, and for somebody who
understands printers." Please explain these rules in a friendly letter to a family that has just
moved to the town and has two children, aged five and thirteen.""",
    """Here is the beginning of a story. The lighthouse stood at the end of a long spit of sand,
and for thirty years the same man had lived in it. Every evening he climbed the hundred and forty
steps to the lamp, and every morning he climbed down again, made tea, and wrote one line in a
book: the wind, the waves, the ships that had passed. In all that time he had never missed a line.
Then one morning in November, when the fog was so thick that he could not see his own boots, he
opened the door and found a small wooden boat on the sand, with no oars and no name, and in it a
girl of about ten years, fast asleep under a sail. She had a brass key on a string around her
neck. He carried her inside, put her by the stove, and wrote in his book: fog, no wind, no ships,
one visitor. When she woke up she looked at the clock, looked at the stairs, and asked him whether
the lamp was still burning. Please continue the story and tell me who the girl is and what the key
opens.""",
    """I am preparing a lesson for a class of twelve-year-olds about how water moves around the
world. They know that rain falls from clouds and that rivers run into the sea, but when I asked
them where the rain comes from, most of them said that clouds are made of smoke or cotton. One of
them asked why the sea does not overflow if all the rivers run into it, another asked why it
snows in the mountains and rains in the valley on the same day, and a third wanted to know whether
the water that we drink today is the same water that the dinosaurs drank. I have a kettle, a cold
plate, a glass bowl, some salt, a lamp and a bag of ice, and the lesson is forty-five minutes
long. I would like to begin with an experiment, then explain the water cycle step by step with
the right words, and at the end answer the three questions. Please write the explanation of the
water cycle for me, in simple words, with one paragraph for each step, and then answer the three
questions of the children.""",
    """My friend and I are having a discussion about how to travel. We both have to go from a
village in the hills to a city by the sea, which is about three hundred kilometres away. She wants
to take the train. It leaves at seven in the morning, takes four and a half hours, and we would
have to change once, with twenty minutes for the change. The tickets cost forty euros each if we
buy them a week before. I would like to drive. My car is old but good, the motorway is free for
most of the way, and I think that it takes three and a half hours if there is not much traffic;
petrol would cost about fifty euros for both of us. We have two suitcases and a large box of
books, and in the city we are going to stay for three nights in a hotel in the old town, where
cars are not allowed and parking costs twenty-five euros a day. We both get tired when we drive
for a long time. Please compare the two ways to travel, list the advantages and disadvantages of
each, and tell us what you would do.""",
)


def encoded(tokenizer) -> list[list[int]]:
    """The prompts as a chat: over 200 tokens each."""
    chats = ([{"role": "user", "content": text.replace("\n", " ")}] for text in PROMPTS)
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]


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
    for number, prompt in enumerate(encoded(tokenizer), 1):
        print(f"\n## prompt {number}, {len(prompt)} tokens")
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
