"""Take one KV head's keys and values out of the demo model, for the figures: ``keys.npz``.

It is the only script here that runs a model; the others draw what this one wrote.
"""

from pathlib import Path

import numpy as np

LAYER, HEAD, TOKENS = 12, 2, 192
FILE = Path(__file__).with_name("keys.npz")


def capture(model, tokenizer) -> dict[str, np.ndarray]:
    """Keys and values ``(192, 64)`` of the shipped text after RoPE, and the layer's centre."""
    from importlib.resources import files

    import mlx.core as mx
    import mlx_lm.models.cache as host

    from vllm_metal_tq.integrations.mlx_lm import calibrate

    data = files("vllm_metal_tq") / "data"
    calibration = tokenizer.encode((data / "calibration.txt").read_text(encoding="utf-8"))
    centre = calibrate(model, calibration[:1024]).centres[LAYER]
    ids = tokenizer.encode((data / "alice.txt").read_text(encoding="utf-8"))[:TOKENS]
    cache = host.make_prompt_cache(model)
    mx.eval(model(mx.array([ids]), cache=cache))
    keys, values = (x[0, HEAD] for x in cache[LAYER].state[:2])
    return {
        "keys": np.array(keys[:TOKENS]).astype(np.float16),
        "values": np.array(values[:TOKENS]).astype(np.float16),
        "pairs": centre.pairs,
        "mu": np.array(centre.mu[HEAD]),
        "smoothing": np.array(centre.smoothing[HEAD]),
        "value_mean": np.array(centre.value_mean[HEAD]),
    }


if __name__ == "__main__":
    from vllm_metal_tq import openblas

    openblas.preload()
    from vllm_metal_tq import demo_model

    np.savez_compressed(FILE, **capture(*demo_model.load()))
