#!/usr/bin/python3
"""Figures of what bench_kernels.py measured: a roofline, and our time by theirs.

The ceilings are those of the same run: its matrix product and its copy. Prefill counts the FLOP of
visible pairs, and as bytes Q, K, V and the output once; decoding counts the K/V that must be read.

usage: bench/kernels/plot.py FILE.jsonl OUT.svg      (Debian's python3-matplotlib)"""

import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from table import read

OURS, OUR_COLOUR, GREY = "RedKnot", "#c1121f", "#8a8a8a"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")


def ceilings(lines):
    """(FLOP/s, byte/s), both in units of 1e12"""
    found = {line["who"]: line for line in lines if line.get("what") == "ceiling"}
    return found["matmul 8192 bf16"]["tflops"], found["copy, read + write"]["tb_per_s"]


def roof(axes, flops, tb_per_s, points):
    low, high = min(x for x, _ in points) / 2, max(x for x, _ in points) * 2
    knee = flops / tb_per_s
    axes.plot([low, knee, high], [low * tb_per_s, flops, flops], color="#222222", lw=1.2, zorder=1)
    axes.text(high, flops * 1.05, f"matrix product {flops:.0f} TFLOP/s", ha="right", fontsize=8)
    at = (low * knee) ** 0.5
    axes.text(at, at * tb_per_s * 1.3, f"copy {tb_per_s:.2f} TB/s", ha="right", fontsize=8)


def in_tflops(line):
    return line["tflops"] if "tflops" in line else line["tb_per_s"] * line["flop_per_byte"]


def style(who, others):
    if who == OURS:
        return {"marker": "*", "color": OUR_COLOUR, "ms": 9, "zorder": 3}
    marker = MARKERS[others.index(who) % len(MARKERS)]
    return {"marker": marker, "color": GREY, "mfc": "none", "ms": 6, "zorder": 2}


def roofline(axes, lines, others):
    points = {}
    for line in lines:
        if "flop_per_byte" in line:
            points.setdefault(line["who"], []).append((line["flop_per_byte"], in_tflops(line)))
    roof(axes, *ceilings(lines), [point for of_one in points.values() for point in of_one])
    for who in sorted(points, key=[*others, OURS].index):
        axes.plot(*zip(*points[who]), ls="", label=who, **style(who, others))
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")
    axes.grid(True, which="major", color="#e4e4e4", lw=0.6)
    axes.legend(loc="lower right", fontsize=8, frameon=False)


def ratios(axes, lines, others):
    """A row for each shape, its opponents as in the roofline; left of 1 ours is faster."""
    compared = [line for line in lines if "ratio" in line and line["who"] in others]
    names = list(dict.fromkeys(f"{line['what']} {line['shape']}" for line in compared))
    for line in compared:
        place = names.index(f"{line['what']} {line['shape']}")
        axes.plot(line["ratio"], place, **style(line["who"], others))
    axes.axvline(1, color=OUR_COLOUR, lw=1.2)
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="our time / theirs")
    axes.grid(True, axis="x", color="#e4e4e4", lw=0.6)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    plt.rcParams.update(
        {
            "font.size": 9,
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    lines = read(sys.argv[1])
    others = sorted({line["who"] for line in lines if "flop_per_byte" in line} - {OURS})
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), facecolor="white")
    roofline(left, lines, others)
    ratios(right, lines, others)
    figure.tight_layout(w_pad=3)
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
