#!/usr/bin/env python3
"""
Goal:   clang-tidy over our own C sources, quick enough to run on each change.
Method: one clang-tidy per source of compile_commands.json, as many at once as
        there are processors. A source without findings is remembered by a hash
        of everything that could change the answer: its text, the project headers
        it reaches, its compile command, .clang-tidy and clang-tidy's version.
        Findings are never remembered, and one in a header is printed once.

run_tidy.py BUILD_DIR [-j N] [--no-cache] [PATH...]
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PRELUDE = os.path.join(ROOT, "tests", "lint", "tidy_prelude.h")
WRAPPED = ("common/base/status.c", "common/base/alloc.c", "tests/common/base/test_alloc.c")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.M)
FINDING = re.compile(r"^(/?[^:\n]+):(\d+):(\d+): (warning|error): ", re.M)
ONE_FILE_TIMEOUT_S = 300
TIDY = "clang-tidy-14"


def cache_folder():
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "redknot", "tidy")


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def reached(path, folders, known):
    """path and the project's headers behind it, generated ones included."""
    if path in known:
        return
    known.add(path)
    for header in INCLUDE.findall(read(path)):
        for folder in [os.path.dirname(path)] + folders:
            full = os.path.normpath(os.path.join(folder, header))
            if os.path.isfile(full):
                reached(full, folders, known)
                break


def command_of(entry):
    return entry.get("arguments") or shlex.split(entry["command"])


def configs_of(path):
    """The .clang-tidy files from the file's folder up to the root."""
    folder = os.path.dirname(path)
    while folder.startswith(ROOT):
        config = os.path.join(folder, ".clang-tidy")
        if os.path.isfile(config):
            yield config
        folder = os.path.dirname(folder)


def key_of(entry, salt):
    words = command_of(entry)
    folders = [ROOT]
    for i, word in enumerate(words):
        if word.startswith("-I") and len(word) > 2:
            folders.append(word[2:])
        elif word in ("-I", "-isystem", "-iquote") and i + 1 < len(words):
            folders.append(words[i + 1])
    known = set()
    reached(entry["file"], folders, known)
    known.update(configs_of(entry["file"]))
    digest = hashlib.sha256(salt)
    digest.update("\0".join(words).encode())
    for path in sorted(known):
        digest.update(f"\0{path}\0{read(path)}".encode())
    return digest.hexdigest()


def is_ours(path, build, only):
    """In the tree, not in any build folder: the generated sources are there."""
    relative = os.path.relpath(os.path.realpath(path), ROOT)
    if relative.startswith(("..", "build" + os.sep)) or not relative.endswith(".c"):
        return False
    if os.path.realpath(path).startswith(build + os.sep):
        return False
    return not only or any(relative == o or relative.startswith(o.rstrip("/") + "/") for o in only)


def prelude_for(path):
    """What defines or tests the functions that the prelude wraps."""
    if os.path.relpath(os.path.realpath(path), ROOT) in WRAPPED:
        return []
    return [f"--extra-arg=-include{PRELUDE}", "--extra-arg=-Wno-unused-value"]


def check(entry, build, salt, cache):
    """(findings' text, was it remembered, did clang-tidy itself fail)"""
    mark = os.path.join(cache, key_of(entry, salt)) if cache else None
    if mark and os.path.exists(mark):
        os.utime(mark)
        return "", True, False
    try:
        done = subprocess.run(
            [TIDY, "-quiet", "-p", build, *prelude_for(entry["file"]), entry["file"]],
            capture_output=True, text=True, errors="replace", check=False,
            timeout=ONE_FILE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"{entry['file']}: no answer in {ONE_FILE_TIMEOUT_S} s\n", False, True
    if done.returncode == 0 and not FINDING.search(done.stdout):
        if mark:
            with open(mark, "w", encoding="utf-8"):
                pass
        return "", False, False
    failed = not FINDING.search(done.stdout)
    return done.stdout + (done.stderr if failed else ""), False, failed


def findings_of(text):
    """Each finding with its notes, by place."""
    starts = [match.start() for match in FINDING.finditer(text)] + [len(text)]
    return [text[a:b].rstrip() for a, b in zip(starts, starts[1:])]


def main():
    parser = argparse.ArgumentParser(description="clang-tidy over our own C sources")
    parser.add_argument("build")
    parser.add_argument("paths", nargs="*", help="only these files or folders, from the root")
    parser.add_argument("-j", type=int, default=os.cpu_count())
    parser.add_argument("--no-cache", action="store_true")
    arguments = parser.parse_intermixed_args()

    build = os.path.realpath(arguments.build)
    with open(os.path.join(build, "compile_commands.json"), encoding="utf-8") as file:
        entries = {entry["file"]: entry for entry in json.load(file)}  # a file once
    entries = [
        entry for path, entry in sorted(entries.items())
        if os.path.isfile(path) and is_ours(path, build, arguments.paths)
    ]
    if not entries:
        print("run_tidy: no source of ours in compile_commands.json", file=sys.stderr)
        return 1
    cache = None if arguments.no_cache else cache_folder()
    if cache:
        os.makedirs(cache, exist_ok=True)
    version = subprocess.run([TIDY, "--version"], capture_output=True, check=True).stdout
    salt = version + read(PRELUDE).encode()

    seen = set()
    remembered = failures = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.j) as pool:
        jobs = [pool.submit(check, entry, build, salt, cache) for entry in entries]
        for job in concurrent.futures.as_completed(jobs):
            text, was_remembered, failed = job.result()
            remembered += was_remembered
            failures += failed
            for finding in [text] if failed else findings_of(text):
                if finding not in seen:
                    seen.add(finding)
                    print(finding, flush=True)
    print(f"{len(entries)} sources, {remembered} unchanged since they were clean, "
          f"{len(seen)} findings")
    return 1 if seen or failures else 0


if __name__ == "__main__":
    sys.exit(main())
