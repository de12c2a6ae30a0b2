#!/usr/bin/env bash
# Goal:   ctest shows a skipped test as skipped, its closing line stays, and the summary names what was skipped and why.
# Method: a test folder made by hand, of a test that passes and one that skips; ctest over it, then the summary. Then
#         that no test skips in a way of its own.
# usage: tests/support/test_skipped.sh TEST_SKIP_PROGRAM SOURCE_DIR
set -euo pipefail
program=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { printf 'test_skipped: %s\n' "$*" >&2; exit 1; }

cat >"$work/CTestTestfile.cmake" <<END
add_test(passes $program)
add_test(skips $program skip)
set_tests_properties(passes skips PROPERTIES SKIP_RETURN_CODE 77)
END
ctest --test-dir "$work" >"$work/out" || fail "ctest takes a skip for a failure: $(cat "$work/out")"
grep -q '100% tests passed, 0 tests failed out of' "$work/out" || fail "ctest's closing line is gone: $(cat "$work/out")"
grep -q 'skips \.*\*\*\*Skipped' "$work/out" || fail "the skip counts as passed: $(cat "$work/out")"

"$source/tests/support/skipped.sh" "$work" >"$work/summary"
grep -qx '  skips: the skipping test: it shows what a skip looks like' "$work/summary" ||
    fail "the summary does not say what was skipped and why: $(cat "$work/summary")"
[ "$(grep -c '^  ' "$work/summary")" = 1 ] || fail "the summary has other lines: $(cat "$work/summary")"

own=$(grep -rlE '\bskip\(\)|return 77|not tested' "$source/tests" --include='*.c' | grep -v 'tests/support/' || true)
[ -z "$own" ] || fail "these skip without tests/support/skip.h: $own"
for file in $(grep -rlE 'test_skip(ped)?\(' "$source/tests" --include='*.c'); do
    grep -q ' main(' "$file" || continue
    grep -q 'test_exit_code(' "$file" || fail "$file: its skips do not reach the exit code"
done
