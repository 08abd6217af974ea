"""KL against bits of all schemes: the points that ``benchmarks/pareto.py`` measured."""

import json

from style import BLUE, HERE, INK, pyplot, save

from vllm_metal_tq.config import PRESETS

OURS = "vllm-metal-tq"
PLAIN = ("q2_0/q2_0", "q3_0/q3_0")  # what trellis codes are compared with
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
        ax.scatter([p["bits"] for p in members], [p["kl"] for p in members], label=family, **dots)
    for point in points():
        if point["family"] == OURS and point["name"] in PRESETS:
            place = {"xytext": (-5, -11), "ha": "right"}
        elif point["name"] in PLAIN:
            place = {"xytext": (7, -3), "ha": "left"}
        else:
            continue
        place |= {"textcoords": "offset points", "color": INK}
        ax.annotate(point["name"], (point["bits"], point["kl"]), **place)
    ax.set(yscale="log", xlabel="bits of an element of K or V, everything included")
    ax.set_ylabel("mean KL divergence, nats")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save(figure, "schemes", folder)


if __name__ == "__main__":
    draw()
