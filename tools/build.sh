#!/usr/bin/env bash
# Configures where that is needed, and builds, saying what it does: on a terminal by one line that moves, elsewhere by
# a line now and then. usage: tools/build.sh BUILD_DIR JOBS [TARGET...]
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1 jobs=$2
shift 2
started=$SECONDS

# The tests are left out while cmocka is missing, so look again when they are wanted.
configured() {
    [ -f "$build/build.ninja" ] || return 1
    [ $# -gt 0 ] || grep -q '^CMOCKA_FOUND:INTERNAL=1' "$build/CMakeCache.txt" || ! pkg-config --exists cmocka
}

if ! configured "$@"; then
    printf 'build: configuring\n'
    log=$(mktemp)
    cmake --preset release -B "$build" -Wno-dev >"$log" 2>&1 || { cat "$log"; rm -f "$log"; exit 1; }
    rm -f "$log"
fi

targets=()
[ $# -eq 0 ] || targets=(--target "$@")
steps=$(ninja -C "$build" -n "$@" | grep -c '^\[' || true)
if [ "$steps" -gt 1 ]; then
    printf 'build: %d steps, %d at once; the first time takes some minutes\n' "$steps" "$jobs"
fi
if [ -t 1 ]; then
    cmake --build "$build" -j "$jobs" "${targets[@]}"
else
    NINJA_STATUS='[%f/%t] ' cmake --build "$build" -j "$jobs" "${targets[@]}" | awk '
        match($0, /^\[[0-9]+\/[0-9]+\] /) {
            split(substr($0, 2, RLENGTH - 3), at, "/")
            tenth = int(10 * at[1] / at[2])
            if (at[2] > 20 && tenth > shown) { shown = tenth; printf "build: %d of %d\n", at[1], at[2]; fflush() }
            next
        }
        /^ninja: (no work to do|Entering)/ { next }
        { print; fflush() }'
fi
[ "$steps" -le 1 ] || printf 'build: done in %d s\n' $((SECONDS - started))
