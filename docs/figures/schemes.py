"""KL against bits of all schemes, those of ``benchmarks/pareto.py`` and more pairs of ours."""

import json
import re

from style import BLUE, HERE, INK, pyplot, save

from vllm_metal_tq.config import PRESETS

OURS = "vllm-metal-tq"
TRELLIS = re.compile(r"\btq?[23]\b")
COLOURS = ["#e08a1e", "#2fa36b", "#d6504e", "#9467bd", "#17a2b8", "#b08968", "#e377c2"]


def points() -> list[dict]:
    """``{family, name, bits, kl}`` each; schemes that are given our tail are left out."""
    return json.loads((HERE / "schemes.json").read_text(encoding="utf-8"))["points"]


def frontier(members: list[dict]) -> list[dict]:
    """Those to which no other is better in both bits and KL."""
    found: list[dict] = []
    for point in sorted(members, key=lambda point: (point["bits"], point["kl"])):
        if not found or point["kl"] < found[-1]["kl"]:
            found.append(point)
    return found


def draw(folder=HERE):
    """Write ``schemes.svg``."""
    families = list(dict.fromkeys(point["family"] for point in points()))
    colours = dict(zip([OURS, *(f for f in families if f != OURS)], [BLUE, *COLOURS], strict=True))
    figure, ax = pyplot.subplots(figsize=(7.2, 5))
    for family, colour in colours.items():
        members = [point for point in points() if point["family"] == family]
        best = frontier(members)
        front = 3 if family == OURS else 2
        line = {"color": colour, "linewidth": 2.5 if family == OURS else 1, "zorder": front}
        ax.plot([p["bits"] for p in best], [p["kl"] for p in best], **line)
        dots = {"color": colour, "s": 30 if family == OURS else 12, "zorder": front}
        coded = [point for point in members if TRELLIS.search(point["name"])]
        plain = [point for point in members if point not in coded]
        ax.scatter([p["bits"] for p in plain], [p["kl"] for p in plain], label=family, **dots)
        if coded:
            dots |= {"marker": "D", "s": 16, "label": f"{family}, with trellis codes"}
            ax.scatter([p["bits"] for p in coded], [p["kl"] for p in coded], **dots)
    for point in points():
        if point["family"] == OURS and point["name"] in PRESETS:
            place = {"xytext": (-5, -11), "textcoords": "offset points", "ha": "right"}
            ax.annotate(point["name"], (point["bits"], point["kl"]), color=INK, **place)
    ax.set(yscale="log", xlabel="bits of an element of K or V, everything included")
    ax.set_ylabel("mean KL divergence, nats")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save(figure, "schemes", folder)


if __name__ == "__main__":
    draw()
