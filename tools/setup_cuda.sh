#!/usr/bin/env bash
# Prints the folder of nvcc: the one that is in PATH or in /usr/local/cuda, or else one installed
# from PyPI (120 MB) into the cache folder. No GPU and no driver is needed to build.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${XDG_CACHE_HOME:-${HOME:?}/.cache}/redknot/cuda
version=13.0
parts=(nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl)

for folder in "$(dirname "$(command -v nvcc || echo /nowhere/nvcc)")" /usr/local/cuda/bin; do
    if [ -x "$folder/nvcc" ]; then
        printf '%s\n' "$folder"
        exit 0
    fi
done
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$version" ]; then
    "$here/setup.sh" "$here/packages-cuda.txt" >&2
    printf 'setup: fetching the CUDA compiler %s from PyPI\n' "$version" >&2
    rm -rf "$venv"
    /usr/bin/python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check "${parts[@]/%/==$version.*}" >&2 ||
        { echo 'setup: cannot fetch the CUDA compiler: put nvcc 13.0 or later in PATH' >&2; exit 1; }
    # Where nvcc tells the linker to look.
    ln -sfn lib "$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13)/lib64"
    printf '%s\n' "$version" >"$venv/installed"
fi
cd "$venv"/lib/python3*/site-packages/nvidia/cu13/bin
pwd
