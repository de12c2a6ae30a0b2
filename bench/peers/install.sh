#!/usr/bin/env bash
# Installs the peers that bench/data_plane.py compares with: Redis from Debian, Mooncake from PyPI into a venv in the
# cache folder. Does nothing, fast, when all is there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${XDG_CACHE_HOME:-${HOME:?}/.cache}/redknot/peers
mooncake=mooncake-transfer-engine-non-cuda==0.3.13.post1

"$here/../../tools/setup.sh" "$here/../../tools/packages-bench.txt" >&2
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$mooncake" ]; then
    printf 'peers: installing %s into %s\n' "$mooncake" "$venv" >&2
    rm -rf "$venv"
    /usr/bin/python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check "$mooncake" >&2
    printf '%s\n' "$mooncake" >"$venv/installed"
fi
