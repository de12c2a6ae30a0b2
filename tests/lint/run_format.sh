#!/bin/sh
# Says which C files of the repository clang-format would change; changes nothing.
# run_format.sh [--fix]   CLANG_FORMAT names another program.
set -eu
cd "$(dirname "$0")/../.."
format=${CLANG_FORMAT:-clang-format-14}
mode="--dry-run -Werror"
if [ "${1:-}" = "--fix" ]; then
    mode="-i"
fi
files=$(mktemp)
trap 'rm -f "$files"' EXIT
# git still lists a file that is deleted and not yet committed.
git ls-files -- '*.c' '*.h' '*.cu' '*.cuh' | while IFS= read -r file; do
    if [ -f "$file" ]; then
        printf '%s\n' "$file"
    fi
done >"$files"
if [ ! -s "$files" ]; then
    echo "run_format.sh: no C file found" >&2
    exit 1
fi
# shellcheck disable=SC2086 # mode is two words
xargs -d '\n' "$format" $mode <"$files"
echo "$(wc -l <"$files") files formatted as .clang-format says"
