#!/usr/bin/env bash
# Runs every fuzz target of a folder for some seconds, two at a time; a crash or a leak fails.
# usage: tests/fuzz/run.sh FOLDER SECONDS
set -euo pipefail
folder=$1 seconds=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export folder seconds work
one() {
    name=$(basename "$1")
    mkdir -p "$work/$name"
    seeds="$folder/seeds/${name}_seeds"
    [ ! -x "$seeds" ] || "$seeds" "$work/$name"
    if "$1" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=20 -print_final_stats=1 \
        -artifact_prefix="$work/$name." "$work/$name" >"$work/$name.log" 2>&1; then
        printf '%s: %s\n' "$name" "$(sed -n 's/^stat::number_of_executed_units: */runs /p' "$work/$name.log")"
    else
        printf '%s: FAILED\n' "$name"
        tail -n 60 "$work/$name.log"
        return 1
    fi
}
export -f one
find "$folder" -maxdepth 1 -type f -perm -u+x | sort | xargs -r -P 2 -I {} bash -c 'one {}'
