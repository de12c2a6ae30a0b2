#!/usr/bin/env python3
"""
Goal:   who may know whom (docs/architecture.md) holds in every source file.
Method: reads each #include and compares it with the tables below. An unknown
        header is a violation too, so that a new library gets its room by decision.

include_direction.py [ROOT]        check a source tree
include_direction.py --self-test   feed it violations and see each one found
"""
import os
import re
import sys
import tempfile

# A room may include itself and these; the longest matching prefix names a file's room.
ROOMS = {
    "common/base/": [],
    "common/": ["common/"],
    "kernels/": ["common/base/"],
    "kvstore/": ["kernels/", "common/"],
    "coordinator/": ["common/"],
    "client/": ["common/"],
    "worker/": ["client/", "kernels/", "common/"],
    "tests/": ["common/", "kernels/", "kvstore/", "coordinator/", "client/", "worker/"],
    "bench/": ["common/", "kernels/", "kvstore/", "coordinator/", "client/", "worker/"],
}
FREE_ROOMS = ("tests/", "bench/")  # may look inside modules and use any library

# Library header -> prefixes of the files that may include it; [""] is every room.
LIBRARIES = [
    (r"grpc/", ["common/rpc/"]),
    (r"(ucp|uct|ucs)/", ["common/transport/"]),
    (r"microhttpd\.h", ["common/metrics/"]),
    (r"rocksdb/c\.h", ["kvstore/", "coordinator/"]),
    (r"liburing(\.h|/)", ["kvstore/"]),
    (r"(oneapi/dnnl/)?dnnl\w*\.h", ["kernels/cpu/"]),
    (r"(openblas/)?(cblas|openblas_config)\.h", ["kernels/cpu/"]),
    (r"math_constants\.h|(cuda|cublas|nv)\w*\.(h|hpp|cuh)|(cuda|cub|cooperative_groups)/", ["kernels/cuda/"]),
    (r"nccl\.h", ["worker/"]),
    (r"pcre2\.h", ["worker/tokenizer/"]),
    (r"openssl/|xxhash\.h|xxh_x86dispatch\.h", ["common/base/"]),
    (r"protobuf-c/", [""]),
    (r"jansson\.h|uthash\.h|utlist\.h|utarray\.h", [""]),
    (r"cmocka\.h|sanitizer/", [""]),
]
ONLY_IN_C_FILES = re.compile(r"protobuf-c/")
GENERATED = re.compile(r"redknot/v1/\w+\.pb-c\.h")
GENERATED_NEVER_IN = ("common/base/", "kernels/")

SYSTEM = re.compile(
    r"(sys|linux|net|netinet|arpa|bits|asm)/[\w/]+\.h|"
    r"(aio|argp|argz|assert|byteswap|complex|cpuid|ctype|dirent|dlfcn|endian|err|errno|error|"
    r"execinfo|fcntl|features|fenv|float|fnmatch|ftw|getopt|glob|grp|ifaddrs|immintrin|"
    r"inttypes|iso646|langinfo|libgen|limits|link|locale|malloc|math|mqueue|netdb|numaif|nl_types|"
    r"obstack|omp|poll|pthread|pwd|regex|sched|search|semaphore|setjmp|signal|spawn|stdalign|"
    r"stdarg|stdatomic|stdbool|stddef|stdint|stdio|stdlib|stdnoreturn|string|strings|syslog|"
    r"termios|tgmath|threads|time|uchar|ucontext|unistd|utime|wchar|wctype|x86intrin)\.h"
)

SOURCES = (".c", ".h", ".cu", ".cuh")
COMMENTS = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include\b[ \t]*(?:(["<])([^">\n]+)[">])?', re.M)


def blank_comments(text):
    """Comments become blank, with the same lines; strings stay, for "//" may stand in them."""

    def blank(match):
        found = match.group(0)
        return found if found[0] == '"' else re.sub(r"[^\n]", " ", found)

    return COMMENTS.sub(blank, text)


def room_of(path):
    rooms = [room for room in ROOMS if path.startswith(room)]
    return max(rooms, key=len) if rooms else None


def module_of(path):
    """A module is a folder; the implementations of kernels share their one header."""
    return "kernels" if path.startswith("kernels/") else os.path.dirname(path)


def is_public(path):
    return (
        path.endswith((".h", ".cuh"))
        and not re.search(r"_internal\.c?u?h$", path)
        and not path.startswith(FREE_ROOMS)
    )


def check_library(path, header):
    """The complaint, "" when all is well, None when header is no known library's."""
    for pattern, homes in LIBRARIES:
        if not re.match(pattern, header):
            continue
        if path.startswith(FREE_ROOMS):
            return ""
        if not any(path.startswith(home) for home in homes):
            return f"{header} belongs to {' and '.join(homes)} only"
        if is_public(path):
            return f"{header} is a third-party header in a public header"
        if ONLY_IN_C_FILES.match(header) and not path.endswith(".c"):
            return f"{header} belongs into .c files only"
        return ""
    return None


def check_project(path, header, exists):
    room = room_of(path)
    if ".." in header.split("/"):
        return f'"{header}": includes are relative to the root, without ".."'
    if GENERATED.fullmatch(header):
        if path.startswith(GENERATED_NEVER_IN):
            return f"{header}: the wire contract is not known in {room}"
        return ""
    if header.endswith(".pb-c.h"):  # of a private .proto in the file's own folder
        proto = os.path.basename(header)[: -len(".pb-c.h")] + ".proto"
        own = os.path.dirname(path)
        if os.path.dirname(header) not in ("", own):
            return f"{header} is generated for another folder"
        if exists(f"{own}/{proto}") or exists(f"{own}/proto/{proto}"):
            return ""
        return f"{own}/{proto} does not exist"
    target = room_of(header)
    if target is None or not exists(header):
        return f'"{header}" is no file relative to the root'
    if not header.startswith(room) and not any(header.startswith(to) for to in ROOMS[room]):
        return f"{room} must not include {header}"
    inside = header.endswith("_internal.h") and module_of(header) != module_of(path)
    if inside and not path.startswith(FREE_ROOMS):
        return f"{header} is private to {module_of(header)}/"
    if target in FREE_ROOMS and not path.startswith(FREE_ROOMS):
        return f"{header} is for tests only"
    return ""


def check_include(path, quote, header, exists):
    if not header:
        return "#include of a macro: name the file"
    complaint = check_library(path, header)
    if complaint is not None:
        return complaint
    if quote == '"':
        return check_project(path, header, exists)
    if SYSTEM.fullmatch(header):
        return ""
    return f"<{header}> is unknown: give it a room in tests/lint/include_direction.py"


def check_text(path, text, exists):
    complaints = []
    text = blank_comments(text)
    for match in INCLUDE.finditer(text):
        complaint = check_include(path, match.group(1), match.group(2), exists)
        if complaint:
            line = text.count("\n", 0, match.start()) + 1
            complaints.append(f"{path}:{line}: {complaint}")
    return complaints


def check_tree(root):
    complaints = []
    files = 0
    tops = sorted({room.split("/")[0] for room in ROOMS})
    for top in tops:
        for folder, _, names in sorted(os.walk(os.path.join(root, top))):
            for name in sorted(names):
                if not name.endswith(SOURCES):
                    continue
                full = os.path.join(folder, name)
                with open(full, encoding="utf-8") as file:
                    text = file.read()
                path = os.path.relpath(full, root)
                complaints += check_text(
                    path, text, lambda h: os.path.isfile(os.path.join(root, h))
                )
                files += 1
    return files, complaints


# (file, include, part of the expected complaint; "" when it is allowed)
CASES = [
    ("worker/engine/engine.c", '"client/kv_client.h"', ""),
    ("worker/engine/engine.c", '"kernels/kernels.h"', ""),
    ("worker/engine/engine.c", '"worker/model/model.h"', ""),
    ("worker/engine/engine.c", '"worker/engine/engine_internal.h"', ""),
    ("worker/engine/engine.c", '"worker/model/model_internal.h"', "private"),
    ("worker/engine/engine.c", '"kvstore/kvstore.h"', "must not include"),
    ("worker/engine/engine.c", '"coordinator/coordinator.h"', "must not include"),
    ("worker/engine/engine.c", '"redknot/v1/worker.pb-c.h"', ""),
    ("worker/engine/engine.c", '"engine_internal.h"', "no file"),
    ("worker/engine/engine.c", '"worker/engine/lost.h"', "no file"),
    ("worker/engine/engine.c", '"../model/model.h"', "relative to the root"),
    ("worker/engine/engine.c", '"worker/engine/../model/model.h"', "relative to the root"),
    ("worker/engine/engine.c", '"tests/support/support.h"', "must not include"),
    ("worker/engine/engine.c", "<pcre2.h>", "belongs to worker/tokenizer/"),
    ("worker/engine/engine.c", "<nccl.h>", ""),
    ("worker/engine/engine.c", "<new_library.h>", "unknown"),
    ("worker/engine/engine.c", "HEADER", "macro"),
    ("worker/tokenizer/bpe.c", "<pcre2.h>", ""),
    ("worker/tokenizer/tokenizer.h", "<pcre2.h>", "public header"),
    ("kvstore/kvstore.c", '"kernels/kernels.h"', ""),
    ("kvstore/kvstore.c", '"worker/model/model.h"', "must not include"),
    ("kvstore/kvstore.c", '"coordinator/coordinator.h"', "must not include"),
    ("kvstore/kvstore.c", '"client/kv_client.h"', "must not include"),
    ("kvstore/tier_nvme.c", "<liburing.h>", ""),
    ("kvstore/kvstore_internal.h", "<rocksdb/c.h>", ""),
    ("kvstore/kvstore.h", "<rocksdb/c.h>", "public header"),
    ("coordinator/index.c", "<liburing.h>", "belongs to kvstore/"),
    ("coordinator/index.c", '"kernels/kernels.h"', "must not include"),
    ("coordinator/index.c", '"kvstore/kvstore.h"', "must not include"),
    ("client/kv.c", '"common/rpc/rpc.h"', ""),
    ("client/kv.c", '"worker/model/model.h"', "must not include"),
    ("client/kv.c", "<grpc/grpc.h>", "belongs to common/rpc/"),
    ("client/kv.c", '"grpc/grpc.h"', "belongs to common/rpc/"),
    ("client/kv.c", "<protobuf-c/protobuf-c.h>", ""),
    ("client/kv_internal.h", "<protobuf-c/protobuf-c.h>", "public header|.c files"),
    ("client/kv_internal.h", "<jansson.h>", ""),
    ("client/kv_client.h", "<jansson.h>", "public header"),
    ("common/rpc/server.c", "<grpc/grpc.h>", ""),
    ("common/rpc/rpc.h", "<grpc/grpc.h>", "public header"),
    ("common/rpc/server.c", '"common/metrics/metrics.h"', ""),
    ("common/rpc/server.c", '"common/metrics/metrics_internal.h"', "private"),
    ("common/rpc/server.c", "<ucp/api/ucp.h>", "belongs to common/transport/"),
    ("common/rpc/server.c", '"client/kv_client.h"', "must not include"),
    ("common/base/log.c", '"common/base/status.h"', ""),
    ("common/base/log.c", '"common/metrics/metrics.h"', "must not include"),
    ("common/base/log.c", '"redknot/v1/common.pb-c.h"', "not known"),
    ("common/base/hash.c", "<openssl/evp.h>", ""),
    ("common/metrics/server.c", "<microhttpd.h>", ""),
    ("common/metrics/server.c", "<xxhash.h>", "belongs to common/base/"),
    ("kernels/cpu/gemm.c", "<dnnl.h>", ""),
    ("kernels/cpu/gemm.c", "<oneapi/dnnl/dnnl.h>", ""),
    ("kernels/cpu/gemm.c", "<cuda_runtime.h>", "belongs to kernels/cuda/"),
    ("kernels/cuda/attention.cu", "<cuda_bf16.h>", ""),
    ("kernels/kernels.h", "<cuda_runtime.h>", "belongs to kernels/cuda/"),
    ("kernels/cpu/gemm.c", '"common/rpc/rpc.h"', "must not include"),
    ("kernels/cpu/gemm.c", '"redknot/v1/common.pb-c.h"', "not known"),
    ("common/rpc/descriptors.c", '"own.pb-c.h"', ""),
    ("coordinator/record.c", '"coordinator/own.pb-c.h"', ""),
    ("coordinator/record.c", '"coordinator/lost.pb-c.h"', "does not exist"),
    ("kvstore/read.c", '"coordinator/own.pb-c.h"', "another folder"),
    ("tests/worker/test_engine.c", '"worker/engine/engine_internal.h"', ""),
    ("tests/worker/test_engine.c", "<cmocka.h>", ""),
    ("tests/worker/test_engine.c", '"../support.h"', "relative to the root"),
]


def self_test():
    wrong = []
    for path, include, expected in CASES:
        text = f"/* first */\n  # include {include}\n"
        found = check_text(path, text, lambda header: "/" in header and "lost" not in header)
        good = not found if not expected else len(found) == 1 and re.search(expected, found[0])
        if not good or (found and not found[0].startswith(f"{path}:2: ")):
            wrong.append(f"{path} {include}: expected '{expected}', got {found}")
    hidden = '/*\n#include <grpc/grpc.h>\n*/\n// #include <grpc/grpc.h>\nchar *s = "/*";\n'
    if check_text("client/a.c", hidden, lambda header: True):
        wrong.append("an include in a comment was counted")
    if len(check_text("client/a.c", hidden + "#include <grpc/grpc.h>\n", lambda h: True)) != 1:
        wrong.append("an include behind a string with a comment's beginning was lost")
    with tempfile.TemporaryDirectory() as root:  # The walk itself finds files.
        os.makedirs(os.path.join(root, "kvstore", "deep"))
        with open(os.path.join(root, "kvstore", "deep", "a.c"), "w", encoding="utf-8") as file:
            file.write("#include <grpc/grpc.h>\n")
        if len(check_tree(root)[1]) != 1 or main([root]) != 1:
            wrong.append("a violation in a tree was not found")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(CASES) + 3} cases, {len(wrong)} wrong")
    return 1 if wrong else 0


def main(arguments):
    if arguments == ["--self-test"]:
        return self_test()
    here = os.path.dirname(os.path.abspath(__file__))
    root = arguments[0] if arguments else os.path.dirname(os.path.dirname(here))
    files, complaints = check_tree(root)
    for complaint in complaints:
        print(complaint)
    print(f"{files} files, {len(complaints)} violations")
    return 1 if complaints or files == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
