"""The table of what bench_kernels.py measured, in Markdown, for docs/benchmarks.md.

usage: bench/kernels/table.py FILE.jsonl"""

import json, sys

UNITS = {"tflops": ("TFLOP/s", ".0f"), "tb_per_s": ("TB/s", ".3g")}


def rate(line):
    for field, (unit, form) in UNITS.items():
        if field in line:
            return f"{format(line[field], form)} {unit}"
    return ""


def time_text(us):
    return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} µs"


def markdown(lines):
    """Ceilings, then a row for each kernel and shape; the last column is our time by theirs."""
    out = ["| ceiling | measured |", "|---|---|"]
    out += [
        f"| {x['who']} | {rate(x)} |" for x in lines if x.get("what") == "ceiling" and "us" in x
    ]
    out += [
        "",
        "| what | shape | kernel | time | rate | ours / theirs |",
        "|---|---|---|---|---|---|",
    ]
    last = None
    for line in lines:
        if "us" not in line or line["what"] == "ceiling":
            continue
        group = (line["what"], line["shape"])
        what, shape = group if group != last else ("", "")
        last = group
        ratio = f"{line['ratio']:.2f}" if "ratio" in line else ""
        cells = (what, shape, line["who"], time_text(line["us"]), rate(line), ratio)
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def read(path):
    """The JSON lines; what stands between them, such as a table, is passed over."""
    with open(path) as file:
        return [json.loads(line) for line in file if line.startswith("{")]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(markdown(read(sys.argv[1])))
