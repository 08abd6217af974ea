"""The command line with a tiny model of random weights in place of whatever ``--model`` names."""

import sys
from pathlib import Path


def load(*args, **kwargs):
    """``(model, tokenizer)``, as ``mlx_lm.load``."""
    import models
    import serving

    return models.llama(num_hidden_layers=1), serving.tokenizer()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from vllm_metal_tq import openblas

    openblas.preload()
    import mlx_lm

    from vllm_metal_tq import demo_model
    from vllm_metal_tq.cli import main

    mlx_lm.load = demo_model.load = load
    words = sys.argv[1:]
    if words[:1] == ["serve"]:
        words += ["--port", "0"]  # whichever is free
    sys.exit(main(words))
