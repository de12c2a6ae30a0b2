#!/usr/bin/env bash
# Goal:   a kernel that spills registers fails the build, and its words say why.
# Method: tools/nvcc_checked.sh compiles one kernel twice: with the registers that it needs, and
#         with 24.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$(tools/setup_cuda.sh):$PATH"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/k.cu" <<'EOF'
__global__ void kernel(float *x)
{
    float y[64];
#pragma unroll
    for (int i = 0; i < 64; i++) {
        y[i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; i++) {
        x[i * 32 + threadIdx.x] = y[i] * y[63 - i];
    }
}
EOF
compile() {
    tools/nvcc_checked.sh nvcc -gencode arch=compute_90a,code=sm_90a -Xptxas=-v "$@" \
        -c "$folder/k.cu" -o "$folder/k.o" 2>"$folder/log"
}
compile || { cat "$folder/log"; echo "a sound kernel was refused"; exit 1; }
[ -s "$folder/k.o" ] || { echo "no object file"; exit 1; }
if compile -maxrregcount=24; then
    echo "a kernel that spills passed"
    exit 1
fi
grep -q 'spill' "$folder/log" || { cat "$folder/log"; echo "no word on the spill"; exit 1; }
[ ! -e "$folder/k.o" ] || { echo "the refused object file was left"; exit 1; }
echo "nvcc_checked.sh refuses a kernel that spills"
