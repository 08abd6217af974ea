"""KL against bits: ours and every scheme of baselines.py, at equal conditions, with a plot.

    python benchmarks/pareto.py --out DIR [--text FILE] [--window 1024] [--tokens 1024]

writes points.json, pareto.md and pareto.png. Points that DIR/points.json already has of the same
run are not measured again, so a run that was broken off goes on.
"""

import argparse
import hashlib
import json
from pathlib import Path

from vllm_metal_tq import openblas

openblas.preload()

import baselines  # noqa: E402
import shipped  # noqa: E402

from vllm_metal_tq import TurboQuantConfig, demo_model, sweep  # noqa: E402
from vllm_metal_tq.evaluate import OURS, Method, Quality, compressed  # noqa: E402
from vllm_metal_tq.sweep import Point  # noqa: E402

TOGETHER = 6  # methods measured in one go; the uncompressed cache runs once for each such group
BUDGETS = [2.5 + 0.25 * i for i in range(23)]


def ours(model, tokenizer, window: int) -> list[Method]:
    """Our widths, calibrated as at first use, with the tail and without."""
    calibration = shipped.calibration(model, tokenizer)
    return [
        compressed(model, TurboQuantConfig(*pair), window, calibration=calibration, tail=tail)
        for tail in (True, False)
        for pair in sweep.PAIRS
    ]


def others(head_dim: int, window: int) -> list[Method]:
    """Every scheme of baselines.py."""
    return [
        Method(scheme.family, scheme.name, scheme.bits(head_dim, window), scheme.caches)
        for scheme in (*baselines.SCHEMES, *baselines.WITH_TAIL)
    ]


def budget_table(mine: list[Point], theirs: list[Point]) -> str:
    """For every budget our best point and the best of the others."""
    lines = [
        "| bits at most | ours | KL mean | best other | KL mean | other / ours |",
        "|---|---|---|---|---|---|",
    ]
    for budget in BUDGETS:
        best, other = (sweep.best_within(group, budget) for group in (mine, theirs))
        cells = [
            f"{point.name} ({point.bits:.2f}) | {point.kl:.5f}" if point else "none | "
            for point in (best, other)
        ]
        ratio = f"{other.kl / best.kl:.1f}" if best and other else ""
        lines.append(f"| {budget:.2f} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines) + "\n"


def verdict(mine: list[Point], theirs: list[Point]) -> str:
    """Which points of the others nothing of ours beats, within the budgets."""
    unbeaten = [
        f"{point.name} ({point.bits:.2f} bits, KL {point.kl:.5f})"
        for point in sweep.frontier([*mine, *theirs])
        if point in theirs and BUDGETS[0] <= point.bits <= BUDGETS[-1]
    ]
    if not unbeaten:
        return "Whatever their bits, every other point is beaten by one of ours with no more bits."
    return "Not beaten by one of ours with as many bits: " + "; ".join(unbeaten) + "."


def report(points: list[Point], run: dict) -> str:
    """The Markdown page."""
    quality = points[0].quality
    mine = [point for point in points if point.family == OURS]
    given = [point for point in points if baselines.TAIL_MARK in point.family]
    theirs = [point for point in points if point.family != OURS and point not in given]
    return (
        f"# KL against bits, windows of {run['window']} tokens\n\n"
        f"SmolLM2-135M-Instruct, text {run['text']}, {quality.tokens} positions; perplexity with "
        f"the uncompressed cache {quality.ppl_reference:.2f}. Bits count everything that a cache "
        f"of {run['window']} tokens stores, windows and tails included.\n\n"
        f"## At every budget\n\n{budget_table(mine, theirs)}\n{verdict(mine, theirs)}\n\n"
        f"## Others that were given our tail\n\n{sweep.markdown(given)}\n"
        f"{verdict(mine, given)}\n\n## All points\n\n{sweep.markdown(points)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--only", choices=("ours", "others"))
    args = parser.parse_args()
    if missing := sweep.why_not_draw():
        parser.error(missing)
    text = args.text.read_text(encoding="utf-8") if args.text else shipped.text("alice.txt")
    run = {
        "text": args.text.name if args.text else "alice.txt",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "window": args.window,
        "tokens": args.tokens,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "points.json"
    points = _stored(file, run)
    model, tokenizer = demo_model.load()
    wanted = [] if args.only == "others" else ours(model, tokenizer, args.window)
    if args.only != "ours":
        head_dim = model.args.hidden_size // model.args.num_attention_heads
        wanted += others(head_dim, args.window)
    known = {point.name for point in points}
    todo = [method for method in wanted if method.name not in known]
    ids = tokenizer.encode(text)
    for i in range(0, len(todo), TOGETHER):
        group = todo[i : i + TOGETHER]
        found = sweep.measure(model, ids, group, window=args.window, tokens=args.tokens)
        points += found
        record = run | {"points": [point.fields() for point in points]}
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for point in found:
            print(f"{point.bits:.2f} bits, KL {point.kl:.5f}: {point.name}", flush=True)
    (args.out / "pareto.md").write_text(report(points, run), encoding="utf-8")
    title = f"SmolLM2-135M-Instruct, windows of {args.window} tokens"
    published = [point for point in points if baselines.TAIL_MARK not in point.family]
    sweep.draw(published, str(args.out / "pareto.png"), title)


def _stored(file: Path, run: dict) -> list[Point]:
    if not file.exists():
        return []
    record = json.loads(file.read_text(encoding="utf-8"))
    points = record.pop("points")
    if record != run:
        raise SystemExit(f"{file} is of another run: {record}, not {run}")
    return [
        Point(
            fields.pop("family"),
            fields.pop("name"),
            Quality(**{name: x for name, x in fields.items() if name != "dppl_percent"}),
        )
        for fields in points
    ]


if __name__ == "__main__":
    main()
