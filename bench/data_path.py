#!/usr/bin/python3
"""Reads of 64 KiB, 1 MiB and 16 MiB from a store of this machine over each path, in interleaved rounds, checksums on,
every page verified by the reader. CPU seconds are those of reader and store.

usage: bench/data_path.py [--rounds N] [--seconds S]
JSON lines: one per round, path and size, then the medians."""
import argparse, json, statistics, subprocess

from cluster import ROOT, cluster, machine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    a = parser.parse_args()
    print(json.dumps({"bench": "data_path", **machine()}), flush=True)
    rows = {}
    with cluster(1) as (_, state):
        by_role = {p["role"]: p for p in state["processes"]}
        out = subprocess.run([ROOT / "build/bin/bench_data_path", by_role["coordinator"]["address"], str(by_role["store"]["pid"]),
                              str(a.rounds), str(a.seconds)], stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in out.splitlines():
        row = json.loads(line)
        if row["round"] >= 0:
            print(line, flush=True)
            rows.setdefault((row["bytes"], row["path"]), []).append(row)
    for (size, path), group in sorted(rows.items()):
        median = {k: round(statistics.median(r[k] for r in group), 3) for k in ("gb_per_s", "p50_us", "p99_us", "cpu_s_per_gb")}
        print(json.dumps({"what": "median", "path": path, "bytes": size, **median}))


if __name__ == "__main__":
    main()
