#!/usr/bin/env bash
# Model-checks with spin the protocol of puts and reads (kvstore_protocol.pml, P1 to P7), a reader's
# connection with its guard (reader_connection.pml, P8 to P10) and a value with its two places
# (value_places.pml, P11) over all interleavings of some sizes, then itself: every seeded bug must be
# found by the property it breaks. One core, about a minute, at most 2 GB. An error, a search that is
# not complete or a bug that is not found fails.
# usage: tests/model/run.sh            needs spin and gcc
set -euo pipefail
export LC_ALL=C
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# The model that the next searches are about.
about() { model=$here/$1.pml name=$1.pml; }
about kvstore_protocol

depth=1000 memory_mb=2000 limit_s=120
defines=""
one="-DSHARDS=1 -DPAGES=2 -DGENERATIONS=3 -DATTEMPTS=2 -DEVENTS=1"
few="-DSHARDS=1 -DPAGES=2 -DGENERATIONS=2 -DATTEMPTS=1"
two="-DSHARDS=2 -DPAGES=1 -DGENERATIONS=2 -DATTEMPTS=1 -DEVENTS=1"

fail() {
    printf 'run.sh: %s\n' "$1" >&2
    [ ! -s log ] || grep -v '^Depth=' log | head -n 40 >&2
    story >&2
    exit 1
}

# What happened up to the error that was found last.
story() {
    [ -f "$name.trail" ] || return 0
    # shellcheck disable=SC2086
    spin -t -k "$name.trail" $defines "$model" 2>/dev/null |
        grep -E '(store|coordinator|(writer|reader) [0-9]): ' | sed 's/^ */    /'
}

# build DEFINES GCC_FLAGS: the verifier of the model in this form.
build() {
    defines=$1
    rm -f pan* ./*.trail log
    cp "$model" "$name"
    # shellcheck disable=SC2086 # several words each
    spin -a $defines "$name" >log || fail "spin refuses the model: $defines"
    # shellcheck disable=SC2086
    gcc -w -DMEMLIM=$memory_mb $2 -o pan pan.c 2>log || fail "gcc refuses the verifier"
}

# search FLAGS: sets errors, states and seconds. A search that ends early without an error fails.
search() {
    # shellcheck disable=SC2086
    timeout "$limit_s" ./pan -m$depth -w24 $1 >log 2>&1 || fail "the search broke off: $defines"
    errors=$(sed -n 's/.*errors: \([0-9]*\)$/\1/p' log)
    states=$(awk '/states, stored/ { print $1 }' log)
    seconds=$(awk '/pan: elapsed time/ { print $4 }' log)
    if [ -z "$errors" ] || [ -z "$states" ] || [ -z "$seconds" ]; then
        fail "the search broke off: $defines"
    fi
    if [ "$errors" = 0 ] && grep -qE 'not completed|too small|out of memory|MEMLIM' log; then
        fail "the search is not complete: $defines"
    fi
}

# Which property the assertion that failed belongs to: its line of the model says so.
property() {
    local line
    # shellcheck disable=SC2086
    line=$(spin -t -k "$name.trail" $defines "$model" 2>&1 |
        sed -n 's/.*\.pml:\([0-9]*\), Error: assertion violated.*/\1/p' | head -n 1)
    [ -z "$line" ] || sed -n "${line}s/.*\/\* \(P[0-9]*\) \*\/.*/\1/p" "$model"
}

holds() { # WHAT DEFINES
    build "$2" "-O1 -DSAFETY"
    search ""
    [ "$errors" = 0 ] || fail "an error was found: $1"
    printf '  %-52s %9d states %5.1f s\n' "$1" "$states" "$seconds"
    total=$((total + states))
}

found() { # WHAT PROPERTY DEFINES
    build "$3" "-O0 -DSAFETY"
    search ""
    [ "$errors" != 0 ] || fail "not found: $1"
    local by
    by=$(property)
    [ "$by" = "$2" ] || fail "found by ${by:-something else} and not by $2: $1"
    printf '  %-52s found by %s, %d states\n' "$1" "$by" "$states"
}

total=0
echo "searches, each for P1 to P7:"
holds "1 shard of 2 pages, room for 2 shards, 3 generations" "$one -DCAPACITY=4"
holds "1 shard of 2 pages, room for 1 shard, 3 generations" "$one -DCAPACITY=2"
holds "1 shard of 2 pages, room for 2 shards, 2 events" "$few -DCAPACITY=4 -DEVENTS=2"
holds "2 shards of 1 page, room for 3 shards" "$two -DCAPACITY=3"
safety=$total

build "$few -DCAPACITY=4 -DEVENTS=1 -DLIVENESS" "-O1 -DNFAIR=3"
search "-a -f -N pins_end"
[ "$errors" = 0 ] || fail "pins_end does not hold"
pins=$states
search "-a -f -N room_back"
[ "$errors" = 0 ] || fail "room_back does not hold"
room=$states

printf '%s\n' \
    "P1 no torn or stale read under a pin: holds, assertion, $safety states" \
    "P2 no located shard is lost without an event: holds, assertion, $safety states" \
    "P3 a dead reader's pins end: holds, assertion, $safety states; LTL with weak fairness, $pins" \
    "P3 the room comes back: holds, assertion, $safety states; LTL with weak fairness, $room" \
    "P4 visible whole, located all or none: holds, assertion, $safety states" \
    "P5 nobody is stuck, room is bounded: holds, end states and assertion, $safety states" \
    "P6 index and store agree in the end: holds, assertion, $safety states" \
    "P7 what was dropped stays dropped: holds, assertion, $safety states"

about reader_connection
total=0
holds "2 readers on their connections, 2 events" ""
holds "2 readers, 3 events, 3 reads of what is held" "-DEVENTS=3 -DREADS=3"
echo "P8 what a living reader holds stays: holds, assertion, $total states"
total=0
holds "the guard alone, pins lost at rubbish" "-DGUARD -DBUG_CLOSE_UNPINS"
holds "the guard alone, pins lost at a refusal" "-DGUARD -DBUG_CLOSE_ON_REFUSAL"
echo "P9 what the guard calls sound is sound: holds, assertion, $total states"
total=0
holds "a forked copy that refuses its calls" "-DFORK -DBUG_NO_ECHO"
holds "one that calls, and answers that say what they are" "-DFORK -DBUG_FORK_ASKS"
echo "P10 an answer is to what was asked: holds, assertion, $total states"

about value_places
total=0
holds "a value at 2 stores, 3 writes, 4 events" ""
holds "the first store joins later" "-DJOINS"
echo "P11 no get answers what is older than a write: holds, assertion, $total states"

echo "seeded bugs:"
found "a store comes back with what it had" P11 "-DBUG_COMES_BACK_WITH_VALUES"
found "a store that does not answer counts as empty" P11 "-DBUG_SILENT_COUNTS_AS_EMPTY"
found "a put asks nobody" P11 "-DBUG_PUT_ASKS_NOBODY"
about reader_connection
found "rubbish ends the pins of a living reader" P8 "-DBUG_CLOSE_UNPINS"
found "refusals end the pins of a living reader" P8 "-DBUG_CLOSE_ON_REFUSAL"
found "the seal is broken after the room is given away" P9 \
    "-DGUARD -DBUG_CLOSE_UNPINS -DBUG_SEAL_LATE"
found "a forked copy asks on the same connection" P10 "-DFORK -DBUG_FORK_ASKS -DBUG_NO_ECHO"
about kvstore_protocol
found "evict a pinned shard and free its room" P1 "$one -DBUG_EVICT_PINNED"
found "give back room that a copy is still written to" P1 "$one -DBUG_COPY_UNPINNED"
found "commit of an older generation wins" P2 "$one -DBUG_OLDER_WINS"
found "pins are not released at a reader's death" P3 "$one -DBUG_PINS_LEAK"
build "$few -DEVENTS=1 -DLIVENESS -DBUG_PINS_LEAK" "-O0 -DNFAIR=3"
search "-a -f -N pins_end"
grep -q 'acceptance cycle' log || fail "not found by pins_end: pins are not released"
printf '  %-52s found by LTL pins_end, %d states\n' "the same" "$states"
found "visible before the last page" P4 "$one -DBUG_EARLY_SEAL"
found "each shard is located when it is committed" P4 "$two -DBUG_PUBLISH_EACH"
found "a superseded generation is not told" P6 "$one -DBUG_SUPERSEDED_UNTOLD"
found "a removal before the publication is forgotten" P6 "$one -DBUG_REMOVED_WHILE_PLACED"
found "a commit of what was dropped" P7 "$one -DBUG_COMMIT_DROPPED"
found "a drop knows only the visible generation" P7 "$one -DBUG_DROP_VISIBLE_ONLY"
found "a put takes room that is not there" P5 "$one -DCAPACITY=2 -DBUG_ROOM_UNCHECKED"
found "a put waits for room" P5 "$one -DCAPACITY=2 -DBUG_WAIT_FOR_ROOM"
printf 'all as it must be, %d s\n' "$SECONDS"
