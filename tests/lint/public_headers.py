#!/usr/bin/env python3
"""Each public header alone: C11 and C++17, with all warnings.

usage: public_headers.py SOURCE_DIR CC CXX
"""
import pathlib
import subprocess
import sys

HEADERS = [
    "client/kv_client.h",
    "client/redknot.h",
    "client/values.h",
    "common/transport/transport.h",
    "kernels/device.h",
]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only"]


def main() -> int:
    root, cc, cxx = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    headers = HEADERS + sorted(
        str(path.relative_to(root))
        for path in (root / "common/base").glob("*.h")
        if not path.name.endswith("_internal.h") and path.name not in ("tsan.h", "log.h")  # for us alone: atomics, macros
    )
    bad = 0
    for header in headers:
        text = f'#include "{header}"\n#include "{header}"\n'
        for compiler, language, standard in ((cc, "c", "-std=c11"), (cxx, "c++", "-std=c++17")):
            command = [compiler, "-x", language, standard, *WARNINGS, "-I", str(root), "-"]
            run = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
            if run.returncode != 0:
                bad += 1
                print(f"{header} as {standard}:\n{run.stderr}")
        if 'extern "C"' not in (root / header).read_text():
            bad += 1
            print(f'{header}: no extern "C"')
    print(f"{len(headers)} headers, {bad} faults")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
