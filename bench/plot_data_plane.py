#!/usr/bin/python3
"""One figure of what bench/data_plane.py measured: our paths in colour, peers in grey.

usage: bench/plot_data_plane.py FILE.jsonl OUT.svg      (Debian's python3-matplotlib)"""
import json, sys

import matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt

KIB, MIB = 1 << 10, 1 << 20
STYLES = {  # (peer, path): label, colour, line
    ("redknot", "shm"): ("RedKnot shm", "#c1121f", "-"), ("redknot", "ucx"): ("RedKnot UCX", "#0061a8", "-"),
    ("redknot", "grpc"): ("RedKnot gRPC", "#2a8a3e", "-"),
    ("mooncake", "tcp"): ("Mooncake", "#3d3d3d", "-"), ("redis", "tcp"): ("Redis", "#6b6b6b", "-"), ("redis", "tcp-4x4"): ("Redis 4 x 4", "#6b6b6b", ":"),
    ("tcp", "tcp"): ("bare TCP", "#9a9a9a", "-"), ("ucx", "tcp"): ("bare UCX", "#9a9a9a", "--"), ("grpc", "grpc"): ("bare gRPC", "#9a9a9a", ":")}


def size_name(size):
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def label_ends(axes, ends):
    """Each line's name at its right end, moved apart where they would overlap."""
    place = 0.0
    low, high = axes.get_ylim()
    for value, x, text, colour, bold in sorted(ends, key=lambda end: end[0]):
        place = max(value, place * (high / low) ** 0.052)
        axes.annotate(text, (x, value), (1.03, place), xycoords="data", textcoords=("axes fraction", "data"), va="center", fontsize=8, color=colour,
                      fontweight="bold" if bold else "normal", arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "shrinkA": 0, "shrinkB": 2})


def speeds(axes, rows, title, batched):
    ends = []
    for key, (label, colour, line) in STYLES.items():
        points = sorted((row["bytes"], row["gb_per_s"]) for row in rows if (row["peer"], row["path"]) == key and row["op"] == "get" and (row["batch"] > 1) == batched)
        if not points:
            continue
        ours = key[0] == "redknot"
        axes.plot(*zip(*points), line, color=colour, lw=2.6 if ours else 1.3, marker="o", ms=5 if ours else 3, zorder=3 if ours else 2)
        ends.append((points[-1][1], points[-1][0], label, colour, ours))
    sizes = sorted({row["bytes"] for row in rows if row["op"] == "get" and (row["batch"] > 1) == batched})
    axes.set(xscale="log", yscale="log", title=title, ylabel="GB/s")
    axes.set_xticks(sizes, [size_name(size) for size in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True, color="#e4e4e4", lw=0.6)
    label_ends(axes, ends)


def cpu(axes, rows):
    bars = sorted(((row["cpu_s_per_gb"], *STYLES[row["peer"], row["path"]][:2]) for row in rows
                   if row["op"] == "get" and row["bytes"] == MIB and row["batch"] == 1 and (row["peer"], row["path"]) in STYLES), reverse=True)
    axes.barh([label for _, label, _ in bars], [value for value, _, _ in bars], color=[colour for *_, colour in bars], height=0.6)
    for place, (value, _, _) in enumerate(bars):
        axes.text(value * 1.06, place, f"{value:.2f}", va="center", fontsize=8)
    axes.set(xscale="log", title="CPU seconds per GB, get of 1 MiB")
    if bars:
        axes.set_xlim(bars[-1][0] / 2, bars[0][0] * 2)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", length=0, labelsize=8)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1]) as file:
        rows = [row for row in map(json.loads, file) if row.get("what") == "median"]
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "svg.fonttype": "none", "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False})
    figure, (single, batched, processor) = plt.subplots(1, 3, figsize=(14, 4.2), facecolor="white")
    speeds(single, rows, "get, one value a call", False)
    speeds(batched, rows, "get, 64 values a call (16 of 1 MiB)", True)
    cpu(processor, rows)
    figure.tight_layout(w_pad=3)
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
