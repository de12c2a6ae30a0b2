"""A cluster for benchmarks: `redknot up` in a temporary folder, and its workers over gRPC.
Needs /usr/bin/python3 with grpcio and protobuf, and protoc (make setup installs them)."""
import atexit, contextlib, importlib, json, os, pathlib, shutil, subprocess, sys, tempfile, time

import grpc

ROOT = pathlib.Path(__file__).resolve().parent.parent
REDKNOT = ROOT / "build/bin/redknot"


def messages():
    """The modules of proto/redknot/v1, made on the fly."""
    out = tempfile.mkdtemp(prefix="redknot-proto.")
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    protos = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    subprocess.run(["protoc", "--proto_path=.", f"--python_out={out}", *protos], check=True, cwd=ROOT / "proto")
    sys.path.insert(0, out)
    return importlib.import_module("redknot.v1.worker_pb2")


class Worker:
    def __init__(self, address, pb):
        self.pb = pb
        self.channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", 64 << 20)])
        method = lambda name, request, reply: self.channel.unary_stream(
            f"/redknot.v1.Worker/{name}", request_serializer=request.SerializeToString, response_deserializer=reply.FromString)
        self.generate_call = method("Generate", pb.GenerateRequest, pb.GenerateReply)
        self.put_call = method("PutSegment", pb.PutSegmentRequest, pb.PutSegmentReply)

    def put(self, ids):
        request = self.pb.PutSegmentRequest()
        request.segment.tokens.ids.extend(ids)
        return list(self.put_call(request, timeout=300))[-1]

    def ask(self, segments, prompt, level, tokens=1, publish=False):
        """(seconds to the first token as the client sees it, token ids, report)"""
        request = self.pb.GenerateRequest(level=level, max_tokens=tokens, raw=True, ignore_eos=True, no_publish=not publish)
        for ids in segments:
            request.segments.add().tokens.ids.extend(ids)
        request.prompt.tokens.ids.extend(prompt)
        begin, first, out, report = time.perf_counter(), None, [], None
        for reply in self.generate_call(request, timeout=600):
            if reply.token_ids and first is None:
                first = time.perf_counter() - begin
            out += reply.token_ids
            if reply.HasField("report"):
                report = reply.report
        return first, out, report


@contextlib.contextmanager
def cluster(threads, workers=1, extra=()):
    with tempfile.TemporaryDirectory(prefix="redknot-bench.") as folder:
        up = subprocess.run([REDKNOT, "up", "--dir", folder, "--workers", str(workers), "--threads", str(threads), "--json", *extra],
                            stdout=subprocess.PIPE, check=True)
        try:
            pb = messages()
            state = json.loads(up.stdout)
            addresses = [p["address"] for p in state["processes"] if p["role"] == "worker"]
            yield [Worker(a, pb) for a in addresses], state
        finally:
            subprocess.run([REDKNOT, "down", "--dir", folder], stdout=subprocess.DEVNULL, check=False)


def corpus():
    """Token ids of real text: the golden prompts, over and over with a moving start."""
    cases = json.load(open(ROOT / "tests/golden/smollm2/prompts.json"))["cases"]
    ids = [i for case in cases for i in case["ids"]]
    return lambda start, count: [ids[(start + i) % len(ids)] for i in range(count)]


def machine():
    model = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "?")
    flags = next((l for l in open("/proc/cpuinfo") if l.startswith("flags")), "")
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "amx": " amx_bf16" in flags, "avx512_bf16": " avx512_bf16" in flags}
