#!/usr/bin/python3
"""Time to first token of a 2,048-token context and a 32-token question: cold, exact (same chain), fast (another
order), in interleaved rounds on one worker of a real cluster. The client's clock, so fetch and RPC are in it.

usage: bench/ttft.py [--threads N] [--rounds N] [--segments N] [--tokens N] [--mode bf16|f32]
JSON lines: one per round and level, then the medians."""
import argparse, json, statistics

from cluster import cluster, corpus, machine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--mode", default="bf16")
    a = parser.parse_args()
    text = corpus()
    length = a.tokens // a.segments
    times = {"cold": [], "exact": [], "fast": []}
    print(json.dumps({"bench": "ttft", "threads": a.threads, "mode": a.mode, "tokens": a.tokens, "segments": a.segments, **machine()}), flush=True)
    with cluster(a.threads, extra=("--mode", a.mode)) as ((worker,), _):
        for number in range(a.rounds + 1):
            # New documents in each round, stored alone, and their chain in order.
            documents = [text(9973 * number + 577 * i, length - 1) + [100 + number * a.segments + i] for i in range(a.segments)]
            question = text(31 * number, 32)
            for ids in documents:
                worker.put(ids)
            worker.ask(documents, question, "exact", publish=True)
            other_order = documents[1:] + documents[:1]
            runs = [("cold", documents, "full"), ("exact", documents, "exact"), ("fast", other_order, "fast")]
            for i in range(3):
                name, segments, level = runs[(i + number) % 3]
                ttft, _, report = worker.ask(segments, question, level)
                if number == 0:
                    continue  # warm-up
                times[name].append(ttft)
                print(json.dumps({"round": number, "what": name, "ttft_ms": round(ttft * 1e3, 2), "worker_ttft_ms": round(report.ttft_s * 1e3, 2),
                                  "fetch_ms": round(report.fetch_s * 1e3, 3), "tokens_computed": report.tokens_computed,
                                  "tokens_reused": report.tokens_reused, "bytes_fetched": report.bytes_fetched, "path": report.path}), flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({"what": "median", **{f"{n}_ms": round(v * 1e3, 2) for n, v in median.items()},
                      "cold_over_exact": round(median["cold"] / median["exact"], 1), "cold_over_fast": round(median["cold"] / median["fast"], 1)}))


if __name__ == "__main__":
    main()
