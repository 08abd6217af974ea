"""``vllm-metal-tq serve`` of a small model: ``python serve_part.py KIND FLAGS...``."""

import sys

import conftest  # noqa: F401  # first of all: it loads OpenBLAS
import serving
from part_of_model import MODELS

from vllm_metal_tq.cli import common, main
from vllm_metal_tq.integrations.mlx_lm import distributed


def served(kind):
    """A function in place of ``common.load_model``."""

    def load(name, pipeline=False, **options):
        model = MODELS[kind][0]()
        distributed.shard(model, pipeline)
        return model, serving.tokenizer()

    return load


if __name__ == "__main__":
    common.load_model = served(sys.argv[1])
    sys.exit(main(["serve", "--model", "tiny", "--no-calibrate", *sys.argv[2:]]))
