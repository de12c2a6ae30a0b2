#!/usr/bin/env python3
"""Our paged attention against cuDNN, FlashInfer and flex_attention on one Hopper GPU.

All that a row compares runs in this process, each call in a CUDA graph, the graphs replayed in
turns (timing.py). TFLOP/s counts visible (query, key) pairs only, at 4 FLOP an element of the head;
TB/s counts the K/V that must be read, or the pages that travel, once. ratio is our time by theirs
for the same work: below 1, ours is faster.

usage: bench_kernels.py [--library FILE] [--rows PATTERN] [--who PATTERN] [--rounds N] [--quick]
                        [--window frontend|jax|both] [--flex] [--out FILE]
JSON lines on standard output, a table in Markdown last. Needs torch; FlashInfer, cuDNN's Python
frontend (nvidia-cudnn-frontend) and JAX as far as they are there: what fails is reported and left
out."""

import argparse, gc, json, re, statistics, sys, time

try:
    import torch
except ImportError:
    sys.exit("bench_kernels.py needs PyTorch with CUDA, on a machine with a GPU")
if not torch.cuda.is_available():
    sys.exit("bench_kernels.py: PyTorch finds no GPU; check the driver with nvidia-smi")

import opponents as op
import timing
from table import markdown

OURS = "RedKnot"
OUR_PREFILL = "RedKnot, prefill of all"
PREFILL, WINDOWS = (8192, 32768), (1024, 4096)
DECODE, DECODE_WINDOW = ((1, 32768), (1, 131072), (16, 32768), (64, 8192)), 1024
RECOVERY_TOKENS, RECOVERY_SHARE = 32768, 0.15
TRANSFER_PAGES = 32768


class Row:
    """One comparison: makers of timing.Calls by name, and what the work is.

    flop_of: of makers whose work is not the row's."""

    def __init__(self, what, shape, makers, flop, size, unit, flop_of=()):
        self.what, self.shape, self.makers = what, shape, makers
        self.flop, self.size, self.unit, self.flop_of = flop, size, unit, dict(flop_of)

    def rate(self, who, us):
        work = self.flop_of.get(who, self.flop) if self.unit == "tflops" else self.size
        return work / us / 1e6


def prefill_rows(ours, windows_by, flex):
    for tokens in PREFILL:
        makers = {
            OURS: lambda t=tokens: ours.prefill(t),
            "cuDNN": lambda t=tokens: op.cudnn_prefill(t),
            "FlashInfer fa3 paged": lambda t=tokens: op.flashinfer_prefill(t),
        }
        flop, size = op.prefill_flop(tokens), op.prefill_bytes(tokens)
        yield Row("prefill causal", f"S{tokens}", makers, flop, size, "tflops")
    for window in WINDOWS:
        for tokens in PREFILL:
            shape = (tokens, window)
            makers = {OURS: lambda s=shape: ours.prefill(*s)}
            if windows_by in ("frontend", "both"):
                makers["cuDNN, two calls"] = lambda s=shape: op.cudnn_prefill_two_calls(*s)
            if windows_by in ("jax", "both"):
                makers["cuDNN by JAX, two calls"] = lambda s=shape: op.jax_prefill_two_calls(*s)
            makers["FlashInfer fa3 paged, two calls"] = (
                lambda s=shape: op.flashinfer_prefill_two_calls(*s)
            )
            if flex:
                makers["flex_attention"] = lambda s=shape: op.flex_prefill(*s)
            flop, size = op.prefill_flop(*shape), op.prefill_bytes(tokens)
            name = f"S{tokens} W{window}"
            yield Row("prefill head-class", name, makers, flop, size, "tflops")


def recovery_rows(ours):
    tokens = RECOVERY_TOKENS
    again = torch.randperm(tokens)[: int(tokens * RECOVERY_SHARE)].sort().values.tolist()
    for window in (None, *WINDOWS):
        makers = {
            OURS: lambda w=window: ours.recovery(tokens, again, w),
            OUR_PREFILL: lambda w=window: ours.prefill(tokens, w),
        }
        flop, size = op.recovery_flop(again, window), op.prefill_bytes(tokens)
        name = f"{RECOVERY_SHARE:.0%} of S{tokens}" + (f" W{window}" if window else "")
        whole = {OUR_PREFILL: op.prefill_flop(tokens, window)}
        yield Row("recovery", name, makers, flop, size, "tflops", whole)


def page_rows(ours):
    pages = TRANSFER_PAGES
    size = pages * op.PAGE_BYTES
    for what, to_host in (("pages to pinned host", True), ("pages from pinned host", False)):
        makers = {
            OURS: lambda h=to_host: ours.transfer(pages, h, True),
            "one copy": lambda h=to_host: ours.transfer(pages, h, False),
        }
        yield Row(what, f"{pages} x 32 KB", makers, 0, size, "tb_per_s")
    makers = {OURS: lambda: ours.checksums(pages)}
    yield Row("page checksums", f"{pages} x 32 KB", makers, 0, size, "tb_per_s")


def decode_rows(ours):
    for window in (None, DECODE_WINDOW):
        for shape in DECODE:
            lengths = op.decode_lengths(*shape, window)
            makers = {
                OURS: lambda s=shape, w=window: ours.decode(*s, w),
                "FlashInfer fa2": lambda n=lengths: op.flashinfer_decode(n),
            }
            if window:
                makers["FlashInfer CUDA cores"] = lambda n=lengths: op.flashinfer_decode(n, False)
                makers["cuDNN, two calls"] = lambda s=shape, w=window: op.cudnn_decode_two_calls(
                    *s, w
                )
            else:
                makers["cuDNN"] = lambda s=shape: op.cudnn_decode(*s)
            name = f"B{shape[0]} L{shape[1]}" + (f" W{window}" if window else "")
            what = "decode head-class" if window else "decode dense"
            flop, size = op.decode_flop(lengths), op.decode_bytes(lengths)
            yield Row(what, name, makers, flop, size, "tb_per_s")


def is_quick(row):
    return row.shape.split()[0] in ("S8192", "B1", "B64") and "L131072" not in row.shape


class Report:
    def __init__(self, path):
        self.files, self.lines = [sys.stdout] + ([open(path, "w")] if path else []), []

    def put(self, **line):
        self.lines.append(line)
        for file in self.files:
            print(json.dumps(line), file=file, flush=True)

    def failed(self, who, row, error):
        self.put(who=who, what=row.what, shape=row.shape, error=repr(error)[:400])


def measure(row, who, rounds, report):
    calls = {}
    for name, make in row.makers.items():
        if not re.search(who, name):
            continue
        try:
            calls[name] = make()
        except Exception as error:  # One opponent that fails must not end the others.
            report.failed(name, row, error)
    results = timing.measure(calls, rounds)
    ours = results.get(OURS)
    ours_us = statistics.median(ours) if isinstance(ours, list) else None
    for name, times in results.items():
        if isinstance(times, Exception):
            report.failed(name, row, times)
            continue
        us = statistics.median(times)
        line = {"who": name, "what": row.what, "shape": row.shape, "us": round(us, 2)}
        line |= {"min_us": round(min(times), 2), row.unit: round(row.rate(name, us), 4)}
        if ours_us and name != OURS:
            line["ratio"] = round(row.rate(name, us) / row.rate(OURS, ours_us), 3)
        if row.flop and name != OUR_PREFILL:
            line["flop_per_byte"] = round(row.flop / row.size, 2)
        report.put(**line)


def check(name, shape, function, report):
    """One line with the error against fp32, at a small size; whether it ran."""
    try:
        report.put(who=name, what="check", shape=shape, rel_l2=round(function(), 6))
        return True
    except Exception as error:
        report.put(who=name, what="check", shape=shape, error=repr(error)[:400])
        return False


def clear():
    gc.collect()
    torch.cuda.empty_cache()


def version(name):
    try:
        return __import__(name).__version__
    except Exception:  # Packages without a GPU or with a missing part raise what they like.
        return None


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--library", metavar="FILE", help="libredknot_kernels.so; without it, opponents only"
    )
    parser.add_argument("--rows", metavar="PATTERN", default="", help="e.g. 'decode.*B1 '")
    parser.add_argument("--who", metavar="PATTERN", default="", help="e.g. 'RedKnot|cuDNN'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small shapes, 3 rounds")
    parser.add_argument(
        "--window",
        choices=("frontend", "jax", "both"),
        default="frontend",
        help="how cuDNN's sliding window is called; jax if the frontend fails",
    )
    parser.add_argument("--flex", action="store_true", help="flex_attention too: a minute more")
    parser.add_argument("--out", metavar="FILE", help="the JSON lines, a second time")
    return parser.parse_args()


def main():
    a = arguments()
    torch.manual_seed(1)
    rounds, begin, ours = min(a.rounds, 3) if a.quick else a.rounds, time.monotonic(), None
    report = Report(a.out)
    gpu = torch.cuda.get_device_properties(0)
    report.put(
        bench="kernels",
        gpu=gpu.name,
        sms=gpu.multi_processor_count,
        torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(),
        flashinfer=version("flashinfer"),
        cudnn_frontend=version("cudnn"),
        rounds=rounds,
    )
    if a.library:
        from ours import Ours

        try:
            ours = Ours(a.library)
        except (OSError, AttributeError, RuntimeError) as error:
            sys.exit(f"bench_kernels.py: {a.library} cannot be used: {error}")
        for shape, function in ours.checks():
            check(OURS, shape, function, report)
    if re.search(a.who, "cuDNN, two calls") and a.window != "jax":
        ran = check("cuDNN window", "S2048 W300", op.check_cudnn_window, report)
        a.window = a.window if ran else "jax"  # A weaker clock is better than no opponent.
    if re.search(a.who, "FlashInfer fa3"):
        check("FlashInfer fa3 window", "S2048 W300", op.check_flashinfer_window, report)
    for line in timing.ceilings(rounds):
        report.put(**line)
    clear()
    rows = [*prefill_rows(ours, a.window, a.flex), *decode_rows(ours)]
    if ours:
        rows += [*recovery_rows(ours), *page_rows(ours)]
    for row in rows:
        if not re.search(a.rows, f"{row.what} {row.shape}") or (a.quick and not is_quick(row)):
            continue
        if not ours:
            del row.makers[OURS]
        try:
            measure(row, a.who, rounds, report)
            clear()
        except Exception as error:  # The device's own error: nothing more runs in this process.
            report.failed("all", row, error)
            break
    report.put(bench="kernels", what="end", seconds=round(time.monotonic() - begin))
    print("\n" + markdown(report.lines))


if __name__ == "__main__":
    main()
