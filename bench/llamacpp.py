#!/usr/bin/env python3
"""Cold prefill and decoding of llama.cpp (PyPI xllamacpp), as a baseline for bench/engine.
usage: llamacpp.py MODEL.gguf THREADS IDS.json TOKENS DECODE_CONTEXT ROUNDS; JSON lines as bench/engine prints them."""
import json, os, sys, time
import xllamacpp

model, threads, ids = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
tokens, context, rounds = (int(x) for x in sys.argv[4:7])
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx = 8192
params.n_parallel = 1
params.cache_ram_mib = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
take = lambda n: (ids * (n // len(ids) + 1))[:n]
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:  # one round per line, so that rounds interleave with ours
    what = line.strip()
    if what == "prefill":
        out = server.handle_completions({"prompt": take(tokens), "n_predict": 1, "cache_prompt": False})
        rate = out["timings"]["prompt_per_second"]
    else:
        out = server.handle_completions({"prompt": take(context), "n_predict": 64, "ignore_eos": True, "cache_prompt": True})
        rate = out["timings"]["predicted_per_second"]
    print(json.dumps({"what": what, "threads": threads, "tokens_per_s": round(rate, 1)}), flush=True)
os._exit(0)  # the server keeps threads that do not join
