#!/usr/bin/python3
"""Prefill of 2,048 tokens and decoding behind 512, ours against llama.cpp on the same threads, in interleaved rounds.

usage: bench/prefill.py [--threads N] [--rounds N] [--isa NAME]
llama.cpp is PyPI's xllamacpp 2026.10.11549, installed on first use into a venv in the cache folder.
JSON lines: one per round and program, then medians and ratios."""
import argparse, json, os, pathlib, statistics, subprocess, sys, tempfile

from cluster import ROOT, corpus, machine

CACHE = pathlib.Path(os.environ.get("REDKNOT_CACHE", pathlib.Path.home() / ".cache/redknot"))
MODEL = os.environ.get("REDKNOT_MODEL", str(CACHE / "models/SmolLM2-135M-Instruct.Q4_1.gguf"))


def llama_python():
    venv = CACHE / "bench-venv"
    if not (venv / "installed").exists():
        python = next((p for p in ("python3", "/usr/bin/python3") if subprocess.run(
            [p, "-c", "import ssl, ensurepip, venv"], capture_output=True).returncode == 0), None)
        if python is None:
            sys.exit("bench/prefill.py: no Python with venv: apt-get install python3-venv")
        subprocess.run([python, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin/pip", "install", "-q", "xllamacpp==2026.10.11549"], check=True)
        (venv / "installed").touch()
    return venv / "bin/python"


class Program:
    """A program that answers each line with one JSON line."""

    def __init__(self, name, *command):
        self.name = name
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"})
        self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"bench/prefill.py: {self.name} ended early")

    def run(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", default="auto")
    a = parser.parse_args()
    print(json.dumps({"bench": "prefill", "threads": a.threads, "tokens": 2048, **machine()}), flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as ids:
        json.dump(corpus()(0, 4096), ids)
        ids.flush()
        engine = ROOT / "build/bin/bench_engine"
        programs = [Program("redknot_bf16", engine, MODEL, a.threads, "bf16", a.isa), Program("redknot_f32", engine, MODEL, a.threads, "f32"),
                    Program("llama.cpp", llama_python(), ROOT / "bench/llamacpp.py", MODEL, a.threads, ids.name, 2048, 512, 0)]
        rates = {}
        for number in range(a.rounds):
            for what in ("prefill", "decode"):
                for program in programs[number % 3:] + programs[:number % 3]:
                    result = program.run(what)
                    rates.setdefault((what, program.name), []).append(result["tokens_per_s"])
                    print(json.dumps({"round": number, "who": program.name, **result}), flush=True)
        for program in programs:
            program.close()
    for what in ("prefill", "decode"):
        peer = statistics.median(rates[what, "llama.cpp"])
        for program in programs:
            median = statistics.median(rates[what, program.name])
            print(json.dumps({"what": what, "who": program.name, "threads": a.threads, "median_tokens_per_s": round(median, 1),
                              "over_llama_cpp": round(median / peer, 2)}))


if __name__ == "__main__":
    main()
