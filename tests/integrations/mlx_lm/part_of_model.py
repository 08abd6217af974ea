"""What one process sees of small models that it holds alone or together with others.

``python part_of_model.py FOLDER`` writes it to ``FOLDER/KIND/RANK.npz``; tests call ``seen``.
"""

import sys
from pathlib import Path

import conftest  # noqa: F401  # first of all: it loads OpenBLAS
import mlx.core as mx
import numpy as np
from models import PROMPT, build, greedy, llama, tokens

from vllm_metal_tq import TurboQuantConfig, calibration
from vllm_metal_tq.integrations.mlx_lm import (
    CachePools,
    TurboQuantKVCache,
    calibrate,
    distributed,
    load_prompt_cache,
    lookup,
    make_prompt_cache,
    measure,
    save_prompt_cache,
)

HEADS = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 32}  # for 2 and 3
QWEN2 = {"hidden_size": 384}  # whose head_dim follows from it
STEPS = 10
CONFIG = TurboQuantConfig.from_names("tq4", layers="0=tq8,2=q3_0/q2_0")


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
MINISTRAL = {
    "num_hidden_layers": 6,
    "rope_parameters": {
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 32,
    },
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 4}
MODELS = {
    # kind: its model, and whether its layers are divided and not its heads
    "llama": (lambda: llama(**HEADS), False),
    "gpt_oss": (lambda: build("gpt_oss", **HEADS | WINDOWS | EXPERTS), False),
    "qwen2": (lambda: build("qwen2", **HEADS | QWEN2), False),
    "pipeline": (lambda: build("ministral3", **HEADS | MINISTRAL), True),
}


class Letters:
    """A tokenizer."""

    def encode(self, text):
        return [ord(letter) % 97 for letter in text]


def model_of(kind):
    """The part of the model that this process holds."""
    make, pipeline = MODELS[kind]
    model = make()
    distributed.shard(model, pipeline)
    return model


def logits_of(model, cache, count=STEPS):
    """Logits of a prompt in two chunks and of single tokens, whatever the model makes of them."""
    ids = tokens(PROMPT + count, seed=1)
    chunks = [ids[:, : PROMPT // 2], ids[:, PROMPT // 2 : PROMPT]]
    chunks += [ids[:, i : i + 1] for i in range(PROMPT, PROMPT + count)]
    found = []
    for chunk in chunks:
        found.append(model(chunk, cache=cache)[0, -1])
        mx.eval(found[-1])
    return np.array(mx.stack(found))


def seen(kind, folder):
    """Arrays by name."""
    model = model_of(kind)
    measured = calibrate(model, tokens(100)[0].tolist())
    pools = CachePools(model, CONFIG, calibration=measured)
    cache = pools.make_prompt_cache()
    sampler = distributed.same(_likeliest)
    found = {
        "greedy": greedy(model, cache, count=STEPS, sampler=sampler),
        "drafted": _drafted(model, pools.make_prompt_cache(), sampler),
        "logits": logits_of(model, pools.make_prompt_cache()),
        "uncentred": logits_of(model, make_prompt_cache(model, CONFIG)),
        "heads": [pool.num_kv_heads for pool in pools.pools],
        "k_width": [pool.layout.config.k_width for pool in pools.pools],
        "block_bytes": [pool.block_bytes for pool in pools.pools],
        "centred": [centre is not None for centre in measured.centres],
        "fingerprint": [int(measured.fingerprint, 16) % 2**62],
    }
    for i, centre in enumerate(measured.centres):
        if centre:
            names = (f"{name}{i}" for name in ("pairs", "mu", "t", "m"))
            found |= dict(zip(names, centre.arrays, strict=True))
    found |= _from_file(model, folder) | _kept(model, folder) | _saved(model, cache, folder)
    return {name: np.array(array) for name, array in found.items()}


def _likeliest(logprobs):
    return mx.argmax(logprobs, axis=-1)


def _drafted(model, cache, sampler):
    """Tokens that are looked up and verified, where all caches can give back what is refused."""
    distributed.finish()
    if not all(isinstance(layer, TurboQuantKVCache) for layer in cache):
        return []
    options = {"max_tokens": STEPS, "num_draft_tokens": 3, "sampler": sampler}
    steps = lookup.lookup_generate_step(tokens(PROMPT)[0], model, cache, **options)
    chosen = [token for token, *_ in steps]
    distributed.finish()
    return chosen


def _from_file(model, folder):
    """Logits with the calibration that one process has measured on the whole model."""
    file = folder / "whole.safetensors"
    if not file.is_file():
        return {}
    cache = make_prompt_cache(model, CONFIG, calibration=calibration.load(file, model))
    return {"from_file": logits_of(model, cache)}


def _kept(model, folder):
    """How many files there are once a calibration was made at first use; and it is found."""
    made = measure.find_or_calibrate(model, Letters())
    distributed.most(0)  # all have written
    place = calibration.place(model)
    scratch = [file for file in place.parent.iterdir() if file.name.startswith(".")]
    again = calibration.find(model)
    pairs = zip(made.centres, again.centres, strict=True)
    equal = [bool(mx.array_equal(a.mu, b.mu)) if a and b else a is b for a, b in pairs]
    return {"kept": [place.is_file() and not scratch], "found_again": equal}


def _saved(model, cache, folder):
    """Logits of a continued prompt that was saved, and whether another's file was refused."""
    rank, size = distributed.rank(), distributed.size()
    save_prompt_cache(folder / f"{rank}.safetensors", cache, model)
    distributed.most(0)
    logits = logits_of(model, cache)
    loaded = load_prompt_cache(folder / f"{rank}.safetensors", model)
    refused = False
    try:
        load_prompt_cache(folder / f"{(rank + 1) % size}.safetensors", model)
    except ValueError as error:
        refused = "another model" in str(error)
    same = np.array_equal(logits, logits_of(model, loaded))
    return {"saved_as_never_saved": [same], "others_refused": [refused]}


def main(folder):
    measure.CALIBRATION_TOKENS = 100
    for kind in MODELS:
        own = folder / kind
        np.savez(own / f"{distributed.rank()}.npz", **seen(kind, own))
        print(kind, "done", flush=True)
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
