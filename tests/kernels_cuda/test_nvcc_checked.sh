#!/usr/bin/env bash
# Goal:   a kernel that spills registers, or whose wgmma wait for each other, fails the build, and
#         its words say why.
# Method: tools/nvcc_checked.sh compiles one kernel twice, with the registers that it needs and with
#         24, and one that uses a result of wgmma before it waits for it.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$(tools/setup_cuda.sh):$PATH"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/sums.cu" <<'EOF'
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
cat >"$folder/wgmma.cu" <<'EOF'
__global__ void kernel(float *x, unsigned long long a, unsigned long long b)
{
    float d[4] = {0, 0, 0, 0};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int i = 0; i < 4; i++) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
                     " {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "l"(a), "l"(b));
        d[0] *= 2; /* Not there yet. */
    }
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
EOF
compile() {
    tools/nvcc_checked.sh nvcc -gencode arch=compute_90a,code=sm_90a -Xptxas=-v "${@:2}" \
        -c "$folder/$1.cu" -o "$folder/k.o" >"$folder/log" 2>&1
}
refused() {
    if compile "${@:2}"; then
        echo "$*: passed"
        exit 1
    fi
    grep -q "$1" "$folder/log" || { cat "$folder/log"; echo "$*: no word on it"; exit 1; }
    [ ! -e "$folder/k.o" ] || { echo "$*: the refused object file was left"; exit 1; }
}
compile sums || { cat "$folder/log"; echo "a sound kernel was refused"; exit 1; }
[ -s "$folder/k.o" ] || { echo "no object file"; exit 1; }
refused 'spill' sums -maxrregcount=24
refused 'serialized' wgmma
echo "nvcc_checked.sh refuses kernels that spill, and wgmma that wait for each other"
