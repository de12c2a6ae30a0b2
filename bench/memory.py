#!/usr/bin/python3
"""Resident memory of a worker that has answered over 8,000 tokens: cold (its own pool), then reused (the store's pages).
usage: bench/memory.py [--mode bf16|f32]"""
import argparse, json

from cluster import cluster, corpus, machine


def resident(pid):
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return {key: round(int(line.split()[1]) / 1024, 1) for line in lines for key in [line.split(":")[0]] if key in ("VmHWM", "VmRSS", "RssAnon", "RssShmem")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="bf16")
    a = parser.parse_args()
    text = corpus()
    with cluster(2, extra=("--mode", a.mode)) as ((worker,), state):
        pid = next(p["pid"] for p in state["processes"] if p["role"] == "worker")
        print(json.dumps({"bench": "memory", "mode": a.mode, "when": "started", **resident(pid), **machine()}), flush=True)
        document = text(0, 8000)
        worker.ask([document], text(1, 32), "exact", tokens=32, publish=True)
        print(json.dumps({"bench": "memory", "mode": a.mode, "when": "after 8,032 tokens computed, MiB", **resident(pid)}), flush=True)
        worker.ask([document], text(1, 32), "exact", tokens=32)
        print(json.dumps({"bench": "memory", "mode": a.mode, "when": "after 8,000 tokens reused, MiB", **resident(pid)}), flush=True)


if __name__ == "__main__":
    main()
