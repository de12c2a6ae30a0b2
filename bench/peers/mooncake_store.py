"""Mooncake Store over TCP: get_into, put_from and their batch calls, from registered buffers; master, store and this
agent are three processes.

Mooncake's transfer engine listens on all addresses, so the three share a network namespace that has a loopback device
and nothing else. Runs with the interpreter of the venv that install.sh made.

usage: mooncake_store.py
Says {"servers": [PID...]}, then speaks the protocol of bench/agent.h."""
import ctypes, fcntl, json, mmap, os, pathlib, signal, socket, struct, subprocess, sys, time

import mooncake
from mooncake.store import MooncakeDistributedStore

HOST, PORT = "127.0.0.1", 7300
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)
SET_BYTES_MAX = 256 << 20
LOAD_BYTES, LOAD_VALUES_MAX = 128 << 20, 1024
CALLS_MIN = 3
DROP_MAX = 1024  # keys of one batch_remove
STORE_BYTES = 1 << 30  # more than is loaded and written at most, so that nothing is evicted
TOUCH_BYTES = 16 << 20


def loopback_only():
    if LIBC.unshare(CLONE_NEWNET) and LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        sys.exit(f"Mooncake listens on all addresses, and a network namespace is refused: {os.strerror(ctypes.get_errno())}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def spawn(*command):
    """Dies with us; its output is our stderr."""
    return subprocess.Popen(command, stdout=2, preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


def master_start():
    program = pathlib.Path(mooncake.__file__).parent / "mooncake_master"
    # A short lease, for what was just read cannot be removed.
    master = spawn(program, f"--rpc_address={HOST}", f"--rpc_port={PORT}", f"--metrics_host={HOST}", f"--metrics_port={PORT + 1}",
                   "--default_kv_lease_ttl=500ms", "--enable_metric_reporting=false", "--logtostderr")
    for _ in range(200):
        if master.poll() is not None:
            break
        try:
            socket.create_connection((HOST, PORT), 1).close()
            return master
        except OSError:
            time.sleep(0.05)
    sys.exit("Mooncake: the master does not start")


def connect(segment_bytes):
    store = MooncakeDistributedStore()
    result = store.setup(HOST, "P2PHANDSHAKE", segment_bytes, 64 << 20, "tcp", "", f"{HOST}:{PORT}")
    if result:
        sys.exit(f"Mooncake: setup: {result}")
    return store


class Buffer:
    """Registered memory of 64 MiB, filled with random bytes."""

    def __init__(self, store):
        self.memory = mmap.mmap(-1, 64 << 20)
        self.memory.write(os.urandom(len(self.memory)))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        if store.register_buffer(self.address, len(self.memory)):
            sys.exit("Mooncake: register_buffer failed")


class Agent:
    def __init__(self):
        self.store = connect(0)
        self.source, self.buffer = Buffer(self.store), Buffer(self.store)
        self.loaded, self.fresh = {}, 0

    def call(self, op, prefix, first, batch, size):
        """Seconds of one call. Keys, addresses and sizes are made before, values checked after."""
        keys = [f"{prefix}{size}:{first + i}" for i in range(batch)]
        places = [i * size for i in range(batch)]
        if op == "put":
            for key, at in zip(keys, places):
                self.source.memory[at:at + 8] = hash(key).to_bytes(8, "little", signed=True)
        base = (self.source if op == "put" else self.buffer).address
        addresses, sizes = [base + at for at in places], [size] * batch
        begin = time.perf_counter()
        if batch > 1:
            results = (self.store.batch_put_from if op == "put" else self.store.batch_get_into)(keys, addresses, sizes)
            seconds = time.perf_counter() - begin
        else:
            results = [(self.store.put_from if op == "put" else self.store.get_into)(keys[0], base, size)]
            seconds = time.perf_counter() - begin
        if any(result != (0 if op == "put" else size) for result in results):
            sys.exit(f"Mooncake: {op} of {size} bytes: {results}")
        if op == "get":
            for key, at in zip(keys, places):
                if self.buffer.memory[at:at + 8] != hash(key).to_bytes(8, "little", signed=True):
                    sys.exit(f"Mooncake: {key} is not what was put")
        return seconds

    def touch(self):
        """All of the store's memory, so that puts need not wait for the kernel to find it."""
        count = STORE_BYTES // TOUCH_BYTES * 9 // 10
        for first in range(count):
            self.call("put", "t", first, 1, TOUCH_BYTES)
        if any(self.store.batch_remove([f"t{TOUCH_BYTES}:{first}" for first in range(count)], True)):
            sys.exit("Mooncake: values were not removed")

    def load(self, batch, size):
        count = min(LOAD_VALUES_MAX, LOAD_BYTES // size)
        count = max(2 * batch, count - count % batch)
        if self.loaded.get(size, 0) >= count:
            return self.loaded[size]
        tell("pause")
        for first in range(self.loaded.get(size, 0), count, batch):
            self.call("put", "v", first, min(batch, count - first), size)
        for first in range(0, count - batch + 1, batch):
            self.call("get", "v", first, batch, size)
            if size not in self.loaded and first + batch == count:  # The body of the last batch is still at hand.
                if self.buffer.memory[8:size] != self.source.memory[8:size]:
                    sys.exit(f"Mooncake: a value of {size} bytes is not what was put")
        tell("resume")
        self.loaded[size] = count
        return count

    def drop(self, first, size):
        tell("pause")
        for at in range(first, self.fresh, DROP_MAX):
            keys = [f"f{size}:{key}" for key in range(at, min(at + DROP_MAX, self.fresh))]
            if any(self.store.batch_remove(keys, True)):
                sys.exit(f"Mooncake: values of {size} bytes were not removed")

    def measure(self, op, size, batch, seconds):
        count, first = self.load(batch, size) if op == "get" else 0, 0
        dropped, latencies, total, cpu, begin = self.fresh, [], 0.0, 0.0, time.process_time()
        while total < seconds or len(latencies) < CALLS_MIN:
            if op == "get":
                first = first if first + batch <= count else 0
                latencies.append(self.call(op, "v", first, batch, size))
                first += batch
            else:
                if (self.fresh - dropped + batch) * size > SET_BYTES_MAX:
                    cpu += time.process_time() - begin
                    self.drop(dropped, size)
                    tell("resume")
                    dropped, begin = self.fresh, time.process_time()
                latencies.append(self.call(op, "f", self.fresh, batch, size))
                self.fresh += batch
            total += latencies[-1]
        cpu += time.process_time() - begin
        if op == "put":
            self.drop(dropped, size)
        latencies.sort()
        say({"calls": len(latencies), "bytes": len(latencies) * batch * size, "seconds": total,
             "p50_us": latencies[len(latencies) // 2] * 1e6, "p99_us": latencies[len(latencies) * 99 // 100] * 1e6, "cpu_s": cpu})


def say(line):
    print(json.dumps(line), flush=True)


def tell(what):
    say({what: True})
    if not sys.stdin.readline():
        os._exit(0)


def main():
    os.environ.update(MC_STORE_MEMCPY="0", MC_TCP_BIND_ADDRESS=HOST)  # never a local copy in place of TCP
    if sys.argv[1:] == ["store"]:
        store = connect(STORE_BYTES)
        signal.pause()
        return store
    loopback_only()
    servers = [master_start(), spawn(sys.executable, __file__, "store")]
    agent = Agent()
    for _ in range(100):
        if agent.store.put("ready", b"1") == 0:
            break
        time.sleep(0.1)  # The store has not mounted its memory yet.
    else:
        sys.exit("Mooncake: the store does not start")
    agent.touch()
    say({"servers": [server.pid for server in servers]})
    while line := sys.stdin.readline():
        op, size, batch, seconds = line.split()
        agent.measure(op, int(size), int(batch), float(seconds))
    for server in servers:
        server.kill()
        server.wait()
    os._exit(0)  # Threads of the library do not end by themselves.


if __name__ == "__main__":
    main()
