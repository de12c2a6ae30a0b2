#!/usr/bin/python3
"""Reads and writes through RedKnot's three paths, Mooncake Store, Redis, and bare TCP, UCX and gRPC, in turns.

Everything runs on this machine, over loopback. Each peer has a server and an agent, one client thread that times its
calls (bench/agent.h); this program asks one agent after another, in rounds, so that a change of the machine's speed
meets all. CPU seconds are those of agent and server together. Compare within a round only: the targets at the end are
medians of each round's ratio.

usage: bench/data_plane.py [--quick] [--rounds N] [--seconds S] [--peers NAME,...] [--json FILE]
JSON lines on standard output: one per round, case and peer; then medians; then targets, which are also a table on
standard error. bench/peers/install.sh installs the peers; one that does not start is reported and left out."""
import argparse, contextlib, ctypes, glob, json, os, pathlib, random, re, signal, socket, statistics, subprocess, sys, tempfile, threading, time

from cluster import ROOT, machine

HOST = "127.0.0.1"
BIN = ROOT / "build/bin"
VENV = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "redknot/peers"
REDKNOT_DRAM = "3GiB"  # three agents load 0.4 GiB each, and one at a time writes 0.25 GiB
START_S, MEASURE_S = 30, 120  # patience
KIB, MIB = 1 << 10, 1 << 20

CASES = [(op, size, batch) for op in ("get", "put") for size, batch in (
    (4 * KIB, 1), (64 * KIB, 1), (MIB, 1), (16 * MIB, 1), (4 * KIB, 64), (64 * KIB, 64), (MIB, 16))]
QUICK_CASES = [case for case in CASES if case[1] < 16 * MIB and case[1:] not in ((4 * KIB, 1), (MIB, 16))
               and case not in (("put", 64 * KIB, 1), ("put", 4 * KIB, 64))]

SHM, UCX, GRPC = ("redknot", "shm"), ("redknot", "ucx"), ("redknot", "grpc")
MOONCAKE, REDIS, REDIS_4X4 = ("mooncake", "tcp"), ("redis", "tcp"), ("redis", "tcp-4x4")
SPEED, CPU = "gb_per_s", "cpu_s_per_gb"
TARGETS = [  # (case, ours, theirs, what, at least for SPEED and at most for CPU)
    (("get", MIB, 1), SHM, REDIS, SPEED, 5), (("get", 64 * KIB, 64), SHM, REDIS_4X4, SPEED, 4),
    (("get", 4 * KIB, 64), SHM, REDIS, SPEED, 5),
    (("get", MIB, 1), UCX, ("tcp", "tcp"), SPEED, 0.85), (("get", MIB, 1), UCX, MOONCAKE, SPEED, 1.4),
    (("get", 64 * KIB, 64), UCX, MOONCAKE, SPEED, 1.4), (("get", 4 * KIB, 64), UCX, MOONCAKE, SPEED, 5),
    (("get", MIB, 1), GRPC, ("grpc", "grpc"), SPEED, 0.9),
    (("put", MIB, 1), UCX, MOONCAKE, SPEED, 1.5), (("put", 64 * KIB, 64), UCX, MOONCAKE, SPEED, 1.5),
    (("get", MIB, 1), UCX, MOONCAKE, CPU, 0.8), (("get", MIB, 1), SHM, MOONCAKE, CPU, 0.2)]


class Skipped(Exception):
    """Why a peer does not take part, or not any more."""


# ---- Processes ----

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


class Host:
    """Starts processes that end with this one, whatever happens."""

    def __init__(self, folder):
        self.folder, self.processes, self.ports = pathlib.Path(folder), [], set()

    def spawn(self, name, command, env=None, **pipes):
        program = pathlib.Path(command[0])
        if program.is_absolute() and not program.exists():
            raise Skipped(f"{program.name} is not there")
        log = open(self.folder / f"{name}.log", "w")
        try:
            process = subprocess.Popen(
                command, stderr=log, text=True, env={**os.environ, **(env or {})}, start_new_session=True,
                preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), **({"stdout": log, "stdin": subprocess.DEVNULL} | pipes))
        except OSError as error:
            raise Skipped(str(error)) from error
        process.log = pathlib.Path(log.name)
        self.processes.append(process)
        return process

    def server(self, name, command, port, env=None):
        process = self.spawn(name, command, env)
        end = time.monotonic() + START_S
        while time.monotonic() < end and process.poll() is None:
            if f"{port:04X}" in listening():
                return process
            time.sleep(0.02)
        raise Skipped(f"{name} does not start: {last_line(process)}")

    def port(self):
        """Below the kernel's own, so that nobody is given it meanwhile."""
        while True:
            port = random.randrange(20000, 30000)
            with socket.socket() as probe:
                if port not in self.ports and probe.connect_ex((HOST, port)) != 0:
                    self.ports.add(port)
                    return port

    def end(self):
        for process in self.processes:
            if process.stdin:  # An agent's: its end is the agent's.
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    process.stdin.close()
                    process.wait(2)
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def listening():
    """Ports in hexadecimal; a connection to see it would be taken for the agent's."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
    return {row[1].rsplit(":", 1)[1] for row in rows if row[3] == "0A"}


def last_line(process):
    lines = process.log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {process.poll()}"


def cpu_seconds(pids):
    total = 0
    for pid in pids:
        for path in glob.glob(f"/proc/{pid}/task/*/schedstat"):
            with contextlib.suppress(OSError), open(path) as file:
                total += int(file.read().split()[0])
    return total * 1e-9


# ---- Agents ----

class Agent:
    """One client of one peer; the other end of bench/agent.h."""

    def __init__(self, host, peer, path, command, servers=(), env=None):
        self.peer, self.path, self.servers = peer, path, list(servers)
        self.process = host.spawn(f"{peer}-{path}-agent", [str(word) for word in command], env,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def receive(self):
        timer = threading.Timer(MEASURE_S, self.process.kill)
        timer.start()
        try:
            while line := self.process.stdout.readline():
                if line.startswith("{"):
                    return json.loads(line)
        finally:
            timer.cancel()
        self.process.wait()
        raise Skipped(f"the agent ended: {last_line(self.process)}")

    def send(self, line):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def takes(self, _case):
        return True

    def measure(self, case, seconds):
        cpu = -cpu_seconds(self.servers)
        paused = False
        self.send("{} {} {} {}".format(*case, seconds))
        while "calls" not in (answer := self.receive()):
            paused = "pause" in answer
            cpu += cpu_seconds(self.servers) * (1 if paused else -1)
            self.send("")
        cpu += 0 if paused else cpu_seconds(self.servers)
        return {**answer, "cpu_s": answer["cpu_s"] + cpu}


class RedisBenchmark:
    """redis-benchmark, 4 connections with 4 requests each under way; its times are those of one request."""

    peer, path, VALUES = "redis", "tcp-4x4", 1024

    def __init__(self, port, servers):
        self.port, self.servers, self.rate, self.filled = port, servers, {}, set()

    def takes(self, case):
        return case in (("get", 4 * KIB, 64), ("get", 64 * KIB, 64))

    def fill(self, size):
        """Its keys hold one size at a time, so each measurement of another size begins with this."""
        if self.filled != {size}:
            with socket.create_connection((HOST, self.port)) as connection, connection.makefile("rb") as replies:
                for key in range(self.VALUES):
                    connection.sendall(b"*3\r\n$3\r\nSET\r\n$16\r\nkey:%012d\r\n$%d\r\n%s\r\n" % (key, size, os.urandom(size)))
                    if replies.readline() != b"+OK\r\n":
                        raise Skipped("Redis refused a SET")
            self.filled = {size}

    def measure(self, case, seconds):
        _, size, _ = case
        self.fill(size)
        requests = max(1000, int(self.rate.get(size, 10000) * seconds))
        cpu = os.times()
        cpu = -cpu.children_user - cpu.children_system - cpu_seconds(self.servers)
        out = subprocess.run(["redis-benchmark", "-h", HOST, "-p", str(self.port), "-t", "get", "-d", str(size), "-c", "4", "-P", "4",
                              "-n", str(requests), "-r", str(self.VALUES), "--csv", "--precision", "3"],
                             capture_output=True, text=True, timeout=MEASURE_S, check=False).stdout
        after = os.times()
        cpu += after.children_user + after.children_system + cpu_seconds(self.servers)
        row = re.search(r'^"GET","([\d.]+)","[\d.]+","[\d.]+","([\d.]+)","[\d.]+","([\d.]+)"', out, re.M)  # rps, ms: average, min, p50, p95, p99
        if not row:
            raise Skipped("redis-benchmark says nothing of GET")
        self.rate[size], p50_ms, p99_ms = map(float, row.groups())
        return {"calls": requests, "bytes": requests * size, "seconds": requests / self.rate[size], "p50_us": p50_ms * 1e3, "p99_us": p99_ms * 1e3, "cpu_s": cpu}


# ---- Peers: each starts its servers and returns its agents ----

def start_redknot(host):
    program = BIN / "bench_data_plane"
    if not program.exists():
        raise Skipped(f"{program.name} is not built")
    coordinator, store = host.port(), host.port()
    servers = [
        host.server("coordinator", [BIN / "redknot-coordinator", f"--listen={HOST}:{coordinator}", "--metrics=", f"--data={host.folder / 'coordinator'}"], coordinator),
        host.server("kvstore", [BIN / "redknot-kvstore", f"--coordinator={HOST}:{coordinator}", f"--listen={HOST}:{store}", f"--ucx={HOST}:{host.port()}",
                                f"--shm-socket={host.folder / 'kvstore.sock'}", "--metrics=", f"--dram={REDKNOT_DRAM}", "--scrub-rate=0"], store)]
    time.sleep(1)  # The store registers with the coordinator.
    return [Agent(host, "redknot", path, [program, "--coordinator", f"{HOST}:{coordinator}", "--path", path], [s.pid for s in servers])
            for path in ("shm", "ucx", "grpc")]


def start_mooncake(host):
    agent = Agent(host, "mooncake", "tcp", [VENV / "bin/python", ROOT / "bench/peers/mooncake_store.py"])
    agent.servers = agent.receive()["servers"]
    return [agent]


def start_redis(host):
    port = host.port()
    server = host.server("redis-server", ["redis-server", "--bind", HOST, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(host.folder)], port)
    return [Agent(host, "redis", "tcp", [BIN / "bench_redis", port], [server.pid]), RedisBenchmark(port, [server.pid])]


def start_raw(name, path, env=None):
    def start(host):
        port = host.port()
        program = BIN / f"bench_raw_{name}"
        server = host.server(f"{name}-server", [program, "serve", str(port)], port, env)
        return [Agent(host, name, path, [program, "agent", port], [server.pid], env)]
    return start


PEERS = {"redknot": start_redknot, "mooncake": start_mooncake, "redis": start_redis, "tcp": start_raw("tcp", "tcp"),
         "ucx": start_raw("ucx", "tcp", {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}), "grpc": start_raw("grpc", "grpc")}


def versions():
    def output(*command):
        with contextlib.suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return ""
    installed = VENV / "installed"
    redis = re.search(r"v=(\S+)", output("redis-server", "--version"))
    return {"kernel": os.uname().release, "redis": redis and redis[1], "mooncake": installed.read_text().strip() if installed.exists() else None,
            "ucx": output("dpkg-query", "-W", "-f", "${Version}", "libucx0"), "grpc": output("dpkg-query", "-W", "-f", "${Version}", "libgrpc29")}


# ---- The run ----

class Report:
    def __init__(self, path):
        self.files = [sys.stdout] + ([open(path, "w")] if path else [])
        self.rows = {}  # (case, (peer, path)) -> {round: row}

    def line(self, line):
        for file in self.files:
            print(json.dumps(line), file=file, flush=True)

    def measured(self, agent, case, number, answer):
        op, size, batch = case
        row = {"peer": agent.peer, "path": agent.path, "op": op, "bytes": size, "batch": batch, "gb_per_s": round(answer["bytes"] / answer["seconds"] * 1e-9, 4),
               "p50_us": round(answer["p50_us"], 2), "p99_us": round(answer["p99_us"], 2), "cpu_s_per_gb": round(answer["cpu_s"] / answer["bytes"] * 1e9, 4), "round": number}
        self.rows.setdefault((case, (agent.peer, agent.path)), {})[number] = row
        self.line(row)

    def medians(self):
        for rounds in self.rows.values():
            first = next(iter(rounds.values()))
            self.line({"what": "median", **{k: first[k] for k in ("peer", "path", "op", "bytes", "batch")},
                       **{k: round(statistics.median(row[k] for row in rounds.values()), 4) for k in ("gb_per_s", "p50_us", "p99_us", "cpu_s_per_gb")}})

    def targets(self):
        for case, ours, theirs, field, goal in TARGETS:
            a, b = self.rows.get((case, ours), {}), self.rows.get((case, theirs), {})
            ratios = [a[number][field] / b[number][field] for number in a.keys() & b.keys()]
            ratio = round(statistics.median(ratios), 2) if ratios else None
            reached = None if ratio is None else ratio >= goal if field == SPEED else ratio <= goal
            op, size, batch = case
            self.line({"what": "target", "op": op, "bytes": size, "batch": batch, "ours": "/".join(ours), "theirs": "/".join(theirs), "of": field,
                       "goal": f"{'>=' if field == SPEED else '<='} {goal}", "ratio": ratio, "reached": reached})
            verdict = {None: "not measured", True: "reached", False: "MISSED"}[reached]
            print(f"{op} {size >> 10:5} KiB x {batch:<2}  {'/'.join(ours):12} : {'/'.join(theirs):13} {field:12} "
                  f"{'-' if ratio is None else format(ratio, '.2f'):>7}  goal {'>=' if field == SPEED else '<='} {goal:<4}  {verdict}", file=sys.stderr)


def start_peers(host, names, report):
    agents = []
    for name in names:
        try:
            agents += PEERS[name](host)
        except Skipped as why:
            report.line({"peer": name, "skipped": str(why)})
    return agents


def measure_all(agents, cases, rounds, seconds, report):
    for number in range(-1, rounds):  # The first loads and warms up.
        for case in cases:
            turn = (number + 1) % max(1, len(agents))
            for agent in agents[turn:] + agents[:turn]:
                if not agent.takes(case):
                    continue
                try:
                    answer = agent.measure(case, seconds if number >= 0 else seconds / 4)
                except (Skipped, subprocess.TimeoutExpired) as why:
                    report.line({"peer": agent.peer, "path": agent.path, "skipped": str(why)})
                    agents.remove(agent)
                    continue
                if number >= 0:
                    report.measured(agent, case, number, answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter: two minutes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="the JSON lines, a second time")
    a = parser.parse_args()
    names = a.peers.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"no such peer: {', '.join(unknown)}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    report = Report(a.json)
    report.line({"bench": "data_plane", **machine(), "versions": versions()})
    with tempfile.TemporaryDirectory(prefix="redknot-bench.") as folder:
        host = Host(folder)
        try:
            agents = start_peers(host, names, report)
            measure_all(agents, QUICK_CASES if a.quick else CASES, a.rounds, a.seconds or (0.3 if a.quick else 0.4), report)
        finally:
            host.end()
    report.medians()
    report.targets()


if __name__ == "__main__":
    main()
