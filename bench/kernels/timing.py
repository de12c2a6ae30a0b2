"""Timing of GPU calls that are compared with one another, and the machine's ceilings.

Each call is captured in a CUDA graph, so that launching costs the same for all; the graphs are
replayed in turns, so that a change of the clock meets all. Calls rotate over their sets of inputs,
which the caller makes larger than the L2 cache where bytes are what is measured."""

import statistics

import torch

GRAPH_MS = 4  # a graph holds calls for about this long: much longer than its launch
CALLS_MAX = 512


class Call:
    """What is measured: run(i) queues one call on inputs i < sets.

    graph=False is for calls that cannot be captured: timed by events, one call at a time.
    host=True is for calls that cannot use torch's stream: run(0) returns its own microseconds."""

    def __init__(self, run, sets=1, graph=True, host=False):
        self.run, self.sets, self.graph, self.host = run, sets, graph and not host, host


def event():
    return torch.cuda.Event(enable_timing=True)


def capture(call):
    """A graph of whole passes over the sets, and how many calls it holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # The first pass builds plans; the second tells the time.
        for _ in range(2):
            begin, end = event(), event()
            begin.record()
            for i in range(call.sets):
                call.run(i)
            end.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    passes = max(1, min(int(GRAPH_MS / begin.elapsed_time(end)) + 1, CALLS_MAX // call.sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(passes * call.sets):
            call.run(i % call.sets)
    return graph, passes * call.sets


def measure(calls, rounds=7):
    """{name: [us of each round], or the exception} for {name: Call}."""
    results, ready = {}, {}
    for name, call in calls.items():
        try:
            graph, count = capture(call) if call.graph else (None, 1)
            if call.host:
                call.run(0)
            ready[name], results[name] = (call, graph, count), []
        except Exception as error:  # One opponent that fails must not end the others.
            results[name] = error
    names = list(ready)
    for number in range(-1, rounds):  # The first warms up.
        turn, events = (number + 1) % max(1, len(names)), {}
        for name in names[turn:] + names[:turn]:
            call, graph, count = ready[name]
            if call.host:
                torch.cuda.synchronize()
                us = call.run(0)
                results[name] += [us] * (number >= 0)
                continue
            begin, end = events[name] = event(), event()
            begin.record()
            if graph:
                graph.replay()
            else:
                call.run(0)
            end.record()
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            results[name] += [begin.elapsed_time(end) * 1e3 / ready[name][2]] * (number >= 0)
    return results


def ceilings(rounds):
    """JSON-ready lines: what this GPU reaches in one matrix product and in plain copies."""
    n, half = 8192, 1 << 30
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    device, to = (torch.empty(half, device="cuda", dtype=torch.bfloat16).normal_() for _ in "ab")
    host = torch.empty(half // 2, dtype=torch.bfloat16, pin_memory=True)
    part = device[: half // 2]
    calls = {
        "matmul 8192 bf16": (Call(lambda _: a @ b), "tflops", 2 * n**3 / 1e6),
        "copy, read + write": (
            Call(lambda _: to.copy_(device)),
            "tb_per_s",
            2 * device.nbytes / 1e6,
        ),
        "copy, pinned host to device": (
            Call(lambda _: part.copy_(host, non_blocking=True), graph=False),
            "tb_per_s",
            host.nbytes / 1e6,
        ),
        "copy, device to pinned host": (
            Call(lambda _: host.copy_(part, non_blocking=True), graph=False),
            "tb_per_s",
            host.nbytes / 1e6,
        ),
    }
    # One at a time: a host copy beside the others would warm nothing and cool the chip.
    for name, (call, unit, work) in calls.items():
        times = measure({name: call}, rounds)[name]
        if isinstance(times, Exception):
            yield {"who": name, "what": "ceiling", "error": repr(times)[:300]}
        else:
            us = statistics.median(times)
            yield {"who": name, "what": "ceiling", "us": round(us, 2), unit: round(work / us, 4)}
