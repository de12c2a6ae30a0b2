#!/usr/bin/env python3
"""What the documents name exists, and what the programs offer is documented.

usage: docs.py SOURCE_DIR BIN_DIR | docs.py --self-test

Checked: options (--help of every program, both ways), commands of redknot (both ways), metrics (in the programs' bytes),
targets of make, variables, relative links and their anchors.
"""
import pathlib
import re
import subprocess
import sys

PROGRAMS = ["redknot-coordinator", "redknot-kvstore", "redknot-worker"]
COMMON = {"--help", "--usage", "--version"}
# Of other programs that the documents name: ctest, cmake, argp's own, bench and test scripts.
FOREIGN = re.compile(r"\b(ctest|cmake|bench/|bench_|build/|tests/|tools/|make |apt-get|grpcurl|\.py|\.sh|curl|docker|taskset)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
METRIC = re.compile(r"redknot_(?:coordinator|kvstore|worker|metrics|build)_[a-z0-9_]*[a-z0-9]")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TARGET = re.compile(r"`make ([a-z][a-z-]*)[^`]*`|^make ([a-z][a-z-]*)", re.M)
VARIABLE = re.compile(r"\bREDKNOT_[A-Z_]+\b")


def help_of(command):
    run = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60, check=True)
    return run.stdout


def offered(bin_dir):
    """{program or command: its options}"""
    offers = {p: set(OPTION.findall(help_of([bin_dir / p]))) for p in PROGRAMS}
    commands = re.findall(r"^  ([a-z]+) {2,}\S", help_of([bin_dir / "redknot"]), re.M)
    for command in commands:
        offers["redknot " + command] = set(OPTION.findall(help_of([bin_dir / "redknot", command])))
    return offers


def anchors(text):
    heads = re.findall(r"^#+ +(.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def check_links(path, text, read):
    """Problems of the relative links of one document; read(path) is None where there is no such file."""
    for link in LINK.findall(re.sub(r"`[^`]*`", "", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        found = read(target)
        if found is None:
            yield f"{path}: {link}: no such file"
        elif anchor and anchor not in anchors(found):
            yield f"{path}: {link}: no such heading"


def check_options(path, text, offers):
    known = set().union(*offers.values()) | COMMON
    for number, line in enumerate(text.splitlines(), 1):
        if FOREIGN.search(line):
            continue
        for option in OPTION.findall(line):
            if option not in known:
                yield f"{path}:{number}: {option}: no program has such an option"


def check_commands(path, text, offers):
    commands = {name.split()[1] for name in offers if " " in name}
    for name in re.findall(r"(?:`|^)redknot ([a-z]+)", text, re.M):
        if name not in commands:
            yield f"{path}: redknot {name}: no such command"


def check_metrics(path, text, has_metric):
    for metric in METRIC.findall(text):
        if not has_metric(metric):
            yield f"{path}: {metric}: no program has such a metric"
    for row in re.findall(r"^\|.*redknot_.*$", text, re.M): # `_short` forms behind a whole name
        for short in re.findall(r"`(?:\.\.\.)?(_[a-z0-9_]+)", row):
            if not has_metric(short):
                yield f"{path}: {short}: no program has a metric that ends so"


def check_targets(path, text, targets):
    for pair in TARGET.findall(text):
        name = pair[0] or pair[1]
        if name not in targets:
            yield f"{path}: make {name}: no such target"


def check_documented(reference, offers):
    """Each option in the section of its program or command, or among those that all have."""
    sections = dict(re.findall(r"^#{2,3} (redknot[a-z -]*)\n(.*?)(?=^#|\Z)", reference, re.M | re.S))
    for name, options in offers.items():
        if name not in sections:
            yield f"reference: {name} has no section"
            continue
        text = sections[name] + (sections.get("redknot", "") if " " in name else "")
        for option in sorted(options - COMMON):
            if not re.search(re.escape(option) + r"(?![\w-])", text):
                yield f"reference: {name} {option} is not documented"
    for name in sections:
        if name != "redknot" and name not in offers:
            yield f"reference: {name}: no such program or command"


def documents(source):
    listed = subprocess.run(["git", "-C", source, "ls-files", "-co", "--exclude-standard", "*.md"],
                            capture_output=True, text=True, check=True)
    return [source / name for name in listed.stdout.split() if (source / name).exists()]


def read_file(path):
    if path.is_dir():
        return ""
    return path.read_text(errors="replace") if path.exists() else None


def run(source, bin_dir):
    offers = offered(bin_dir)
    bytes_of = b"".join((bin_dir / p).read_bytes() for p in PROGRAMS)
    targets = set(re.findall(r"^([a-z][a-z-]*):", (source / "Makefile").read_text(), re.M))
    code = subprocess.run(["git", "-C", source, "grep", "-hoE", r"\bREDKNOT_[A-Z_]+\b", "--", "*.c", "*.h", "*.sh", "*.py",
                           "*.txt", "*.cmake", ".ci"], capture_output=True, text=True, check=False).stdout.split()
    problems = list(check_documented(read_file(source / "docs/reference.md") or "", offers))
    names = documents(source)
    for path in names:
        text = read_file(path)
        problems += check_links(path, text, read_file)
        problems += check_targets(path, text, targets)
        problems += [f"{path}: {v}: read nowhere" for v in sorted(set(VARIABLE.findall(text)) - set(code))]
        if path.name == "CHANGELOG.md" or "bench" in path.parts or "kernels" in path.parts:
            continue # What was, and what scripts take.
        problems += check_options(path, text, offers)
        problems += check_commands(path, text, offers)
        problems += check_metrics(path, text, lambda m: (m + "\0").encode() in bytes_of)
    for problem in problems:
        print(problem.replace(str(source) + "/", ""))
    print(f"{len(names)} documents, {len(problems)} problems")
    return 1 if problems else 0


def self_test():
    here = pathlib.Path("docs/x.md")
    files = {"docs/y.md": "# A Head, or two\n", "docs/x.md": ""}
    offers = {"redknot-worker": {"--model", "--help"}, "redknot up": {"--dir", "--json"}}
    good = {
        "links": check_links(here, "[a](y.md) [b](y.md#a-head-or-two) [c](https://x.y/z)", lambda p: files.get(str(p))),
        "options": check_options(here, "`--model FILE`\nctest --verbose\n", offers),
        "commands": check_commands(here, "`redknot up`\nredknot up\nuse redknot as you like", offers),
        "metrics": check_metrics(here, "| `redknot_worker_ttft_seconds`, `_bytes` |", lambda m: m != "none"),
        "targets": check_targets(here, "`make demo`, and make sense", {"demo"}),
        "documented": check_documented("## redknot-worker\n`--model`\n## redknot\n`--json`\n### redknot up\n`--dir`\n", offers),
    }
    bad = {
        "links": (check_links(here, "[a](z.md) [b](y.md#none)", lambda p: files.get(str(p))), 2),
        "options": (check_options(here, "`--modle FILE`", offers), 1),
        "commands": (check_commands(here, "`redknot upp`\nredknot dwon", offers), 2),
        "metrics": (check_metrics(here, "| `redknot_worker_x`, `_y` |", lambda m: False), 2),
        "targets": (check_targets(here, "`make dmeo`", {"demo"}), 1),
        "documented": (check_documented("## redknot-worker\n`--model-x`\n## redknot-none\n", offers), 3),
    }
    for name, problems in good.items():
        found = list(problems)
        assert not found, (name, found)
    for name, (problems, count) in bad.items():
        found = list(problems)
        assert len(found) == count, (name, found)
    print("self-test passed")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--self-test"]:
        sys.exit(self_test())
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(run(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()))
