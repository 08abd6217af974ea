"""The table of docs/quality.md: every preset, and what limits the low widths.

python benchmarks/quality.py [--text FILE] [--tokens 1024]
"""

import argparse

from vllm_metal_tq import openblas

openblas.preload()

from importlib.resources import files  # noqa: E402
from pathlib import Path  # noqa: E402

from vllm_metal_tq import TurboQuantConfig, demo_model  # noqa: E402
from vllm_metal_tq.evaluate import evaluate  # noqa: E402

# (key bits, value bits, tokens that a query sees as they came)
CASES = (
    *((8, 6, 1), (6, 5, 1), (4, 4, 1), (3, 3, 1), (2, 2, 1), (8, 3, 1)),
    *((2, 8, 1), (8, 2, 1), (3, 2, 1), (4, 2, 1)),
    *((4, 4, 33), (3, 3, 33), (2, 2, 33)),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, default=files("vllm_metal_tq") / "data" / "alice.txt")
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    model, tokenizer = demo_model.load()
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    print(
        "| keys / values | as they came | bits | perplexity | change | KL mean | KL p99 | top-1 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for k_bits, v_bits, raw_window in CASES:
        config = TurboQuantConfig(k_bits, v_bits)
        q = evaluate(model, ids, config, tokens=args.tokens, raw_window=raw_window)
        print(
            f"| {config.label} ({k_bits} / {v_bits}) | {raw_window} | {q.bits_per_element:.2f} "
            f"| {q.ppl:.2f} | {q.dppl_percent:+.2f} % | {q.kl_mean:.4f} | {q.kl_p99:.3f} "
            f"| {100 * q.top1:.1f} % |",
            flush=True,
        )
    print(f"\n{q.tokens} positions; perplexity with the uncompressed cache: {q.ppl_reference:.2f}")


if __name__ == "__main__":
    main()
