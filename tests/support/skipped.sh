#!/usr/bin/env bash
# Lists what the last run of ctest skipped, and why; nothing when it skipped nothing.
# usage: tests/support/skipped.sh BUILD_DIR
set -euo pipefail
log=${1:?usage: skipped.sh BUILD_DIR}/Testing/Temporary/LastTest.log
[ -f "$log" ] || exit 0
awk '
    /^[0-9]+\/[0-9]+ Testing: / { test = $3 }
    /^SKIPPED: / {
        line = test ": " substr($0, 10)
        if (!(line in seen)) { seen[line] = 1; lines[++count] = line }
    }
    END {
        if (count) { printf "\nNot tested on this machine:\n" }
        for (i = 1; i <= count; i++) { printf "  %s\n", lines[i] }
    }' "$log"
