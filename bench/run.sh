#!/usr/bin/env bash
# All benchmarks of docs/benchmarks.md, about 15 minutes on a quiet 2-core machine; JSON lines on standard output.
set -euo pipefail
cd "$(dirname "$0")/.."
bench/prefill.py --threads 1 "$@"
bench/ttft.py --threads 1
bench/ttft.py --threads 2
bench/data_plane.py --peers redknot,tcp,ucx,grpc
bench/memory.py
