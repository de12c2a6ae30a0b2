#!/bin/sh
# nvcc_checked.sh COMPILER ARGUMENTS...: runs it, and fails if the assembler says that a kernel
# spills registers, has a stack frame, or has its wgmma serialized (C75xx). Each costs a kernel
# much of its speed and no test notices. Wants -Xptxas -v. What was said stays in OUTPUT.ptxas.
set -u
output=
previous=
for argument in "$@"; do
    [ "$previous" = -o ] && output=$argument
    previous=$argument
done
log=${output:-/tmp/nvcc_checked.$$}.ptxas

"$@" >"$log" 2>&1
status=$?
if [ $status -ne 0 ]; then
    cat "$log" >&2
    exit $status
fi
wrong='(^|[^0-9])[1-9][0-9]* bytes (stack frame|spill|cumulative stack)|C75[0-9][0-9]|serializ'
if grep -Eq "$wrong" "$log"; then
    echo "nvcc_checked.sh: ${output:-output} spills, has a stack frame or serialized wgmma:" >&2
    grep -E "$wrong|Compiling entry function" "$log" | grep -E -B1 "$wrong" >&2
    rm -f "$output"
    exit 1
fi
grep -Ev '^ptxas info|^ +[0-9]+ bytes stack frame' "$log" >&2
[ -n "$output" ] || rm -f "$log"
exit 0
