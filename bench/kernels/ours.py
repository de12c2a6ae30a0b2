"""Our paged attention through its C ABI (ctypes), on torch's stream and with torch's memory.

The structs mirror the header's; a change there is a change here. Each KV head has its own list of
pages, in random order in the pool. A local head of a decoding row holds the page of the sink and
the pages of the window and of 64 tokens more, as a store would between two frees."""

import ctypes
from ctypes import POINTER, Structure, byref, c_bool, c_char, c_float, c_int, c_int32
from ctypes import c_size_t, c_uint32, c_uint64, c_void_p, cast
import weakref

import torch

import opponents as op
from timing import Call

CPU, CUDA = 0, 1
PREFILL, DECODE = 0, 1
BF16 = 0
PINNED = 1
ALL_LIVE = (1 << op.PAGE) - 1


def struct(name, **fields):
    return type(name, (Structure,), {"_fields_": list(fields.items())})


Error = struct("Error", status=c_int, text=c_char * 512, answered=c_bool)
PoolOptions = struct("PoolOptions", head_dim=c_uint32, format=c_int, pages=c_uint32)
PageRef = struct(
    "PageRef", page=c_int32, variant=c_int32, position=c_int32, positions=c_int32, live=c_uint64
)
PageList = struct("PageList", first=c_uint32, count=c_uint32, window=c_uint32, sink=c_uint32)
PlanOptions = struct(
    "PlanOptions",
    kind=c_int,
    num_kv_heads=c_uint32,
    group=c_uint32,
    head_dim=c_uint32,
    rows_max=c_uint32,
    requests_max=c_uint32,
    refs_max=c_uint32,
    explicit_max=c_uint32,
)
Batch = struct(
    "Batch",
    num_requests=c_uint32,
    num_variants=c_uint32,
    row_first=POINTER(c_uint32),
    positions=POINTER(c_int32),
    lists=POINTER(PageList),
    refs=POINTER(PageRef),
    num_refs=c_uint32,
    explicit_positions=c_void_p,
    num_explicit=c_uint32,
    version=c_uint64,
)
Attention = struct(
    "Attention",
    plan=c_void_p,
    pool=c_void_p,
    workspace=c_void_p,
    q=c_void_p,
    positions=c_void_p,
    scale=c_float,
    out=c_void_p,
    lse=c_void_p,
)


class Owned:
    """An object of the library: destroyed when Python forgets it, and before its parent."""

    def __init__(self, library, kind, parent, *arguments):
        self.handle = c_void_p()
        first = [parent.handle] if parent else []
        library.call(f"kernels_{kind}_create", *first, *arguments, byref(self.handle))
        destroy = getattr(library.dll, f"kernels_{kind}_destroy")
        destroy.argtypes, destroy.restype = [c_void_p], None
        weakref.finalize(self, lambda handle, parent: destroy(handle), self.handle, parent)


class Library:
    def __init__(self, path):
        self.dll = ctypes.CDLL(path)
        self.dll.kernels_pool_pages.restype = c_void_p

    def call(self, name, *arguments):
        error = Error()
        if getattr(self.dll, name)(*arguments, byref(error)):
            raise RuntimeError(f"{name}: {error.text.decode(errors='replace')}")


class Lists:
    """Page lists of requests: for each request and KV head the pages' first positions."""

    def __init__(self, batch, tokens, window, decode):
        self.window, self.heads = window, []
        every = list(range(0, tokens, op.PAGE))
        held = window + op.PAGE if window else 0
        local = [p for p in every if p < op.SINK or p + op.PAGE > tokens - held]
        for _ in range(batch):
            self.heads += [every] + [local if decode and window else every] * (op.KV_HEADS - 1)
        self.pages = sum(map(len, self.heads))
        self.live = {}  # first position of a page: its live mask, where not all ones
        self.overlays = []  # positions of the tokens of each overlay page, at the end of each list

    def recover(self, tokens):
        """These tokens get overlay pages; their rows of the other pages are dead."""
        for token in tokens:
            page = token // op.PAGE * op.PAGE
            self.live[page] = self.live.get(page, ALL_LIVE) & ~(1 << token % op.PAGE)
        self.overlays = [tokens[i : i + op.PAGE] for i in range(0, len(tokens), op.PAGE)]
        self.pages += len(self.overlays) * len(self.heads)

    def explicit(self):
        """Their table of positions: rows past the last token, which are dead, repeat it."""
        tables = [t + t[-1:] * (op.PAGE - len(t)) for t in self.overlays]
        return (c_int32 * op.PAGE * len(tables))(*((c_int32 * op.PAGE)(*t) for t in tables))

    def arrays(self, order):
        """The C arrays; order: the number of each page in the pool."""
        refs, lists, at = (PageRef * self.pages)(), (PageList * len(self.heads))(), 0
        for number, head in enumerate(self.heads):
            local = bool(self.window) and number % op.KV_HEADS > 0
            count = len(head) + len(self.overlays)
            lists[number] = PageList(
                at, count, self.window if local else 0, op.SINK if local else 0
            )
            for position in head:
                live = self.live.get(position, ALL_LIVE)
                refs[at] = PageRef(order[at], 0, position, -1, live)
                at += 1
            for table, tokens in enumerate(self.overlays):
                refs[at] = PageRef(order[at], 0, 0, table, (1 << len(tokens)) - 1)
                at += 1
        return refs, lists


class Ours:
    def __init__(self, path, kind=CUDA):
        self.library = Library(path)
        self.torch_device = "cuda" if kind == CUDA else "cpu"
        self.device = Owned(self.library, "device", None, c_int(kind), c_uint32(0))
        self.workspace = Owned(self.library, "workspace", self.device)

    def stream(self):
        on_gpu = self.torch_device == "cuda"
        return c_void_p(torch.cuda.current_stream().cuda_stream if on_gpu else 0)

    def random(self, *shape):
        return torch.randn(*shape, device=self.torch_device).to(torch.bfloat16)

    def pool(self, pages):
        """A pool full of random numbers, and these as a tensor [page][K, V][token][DIM]."""
        options = PoolOptions(op.DIM, BF16, pages)
        pool = Owned(self.library, "pool", self.device, byref(options))
        data = torch.empty(
            pages, 2, op.PAGE, op.DIM, device=self.torch_device, dtype=torch.bfloat16
        ).normal_()
        to = c_void_p(self.library.dll.kernels_pool_pages(pool.handle))
        size = c_size_t(data.nbytes)
        self.library.call(
            "kernels_copy", self.device.handle, to, c_void_p(data.data_ptr()), size, self.stream()
        )
        return pool, data

    def plan(self, kind, pool, lists, order, rows, positions):
        """A plan of the lists on the device; rows: query rows of a request."""
        requests = len(lists.heads) // op.KV_HEADS
        total = requests * rows
        tables = len(lists.overlays)
        options = PlanOptions(
            kind, op.KV_HEADS, op.GROUP, op.DIM, total, requests, lists.pages, tables
        )
        plan = Owned(self.library, "plan", self.device, byref(options))
        refs, heads = lists.arrays(order)
        first = (c_uint32 * (requests + 1))(*range(0, total + 1, rows))
        at = (c_int32 * total)(*positions)
        explicit = lists.explicit()
        batch = Batch(
            requests, 1, first, at, heads, refs, lists.pages, cast(explicit, c_void_p), tables, 0
        )
        changed = c_bool()
        self.library.call(
            "kernels_plan_update", plan.handle, pool.handle, byref(batch), byref(changed)
        )
        self.library.call("kernels_plan_upload", plan.handle, self.stream())
        return plan

    def attention(self, kind, batch, tokens, window, rows, sets):
        """(run(i), inputs and output): the last `rows` tokens of each request are the queries."""
        lists = Lists(batch, tokens, window, kind == DECODE)
        return self.attention_of(kind, lists, list(range(tokens - rows, tokens)), sets)

    def attention_of(self, kind, lists, row_positions, sets):
        """The same for any lists and positions of a request's rows, alike for all requests."""
        batch, rows = len(lists.heads) // op.KV_HEADS, len(row_positions)
        pool, data = self.pool(sets * lists.pages)
        order = torch.randperm(sets * lists.pages).view(sets, lists.pages).tolist()
        positions = row_positions * batch
        plans = [self.plan(kind, pool, lists, one, rows, positions) for one in order]
        on_device = torch.tensor(positions, dtype=torch.int32, device=self.torch_device)
        q = self.random(batch * rows, op.HEADS, op.DIM)
        out = torch.full_like(q, float("nan"))
        calls = [
            Attention(
                plan=plan.handle,
                pool=pool.handle,
                workspace=self.workspace.handle,
                q=q.data_ptr(),
                positions=on_device.data_ptr(),
                scale=op.SCALE,
                out=out.data_ptr(),
            )
            for plan in plans
        ]

        def run(i, alive=(pool, plans, on_device, q, out)):  # What the calls point to.
            self.library.call(
                "kernels_paged_attention", self.device.handle, byref(calls[i]), self.stream()
            )

        return run, (q, data, order, lists, out)

    def prefill(self, tokens, window=None):
        run, _ = self.attention(PREFILL, 1, tokens, window or 0, tokens, 1)
        return Call(run)

    def decode(self, batch, tokens, window=None):
        sets = op.sets_of(op.decode_bytes(op.decode_lengths(batch, tokens, window)))
        run, _ = self.attention(DECODE, batch, tokens, window or 0, 1, sets)
        return Call(run, sets)

    def recovery(self, tokens, again, window=None):
        """Tokens `again` of a context of so many are computed once more, in overlay pages."""
        lists = Lists(1, tokens, window or 0, False)
        lists.recover(again)
        run, _ = self.attention_of(PREFILL, lists, again, 1)
        return Call(run)

    def transfer(self, pages, to_host, paged):
        """Pages in random order to pinned memory or back; not paged: one copy of as many bytes."""
        pool, data = self.pool(pages)
        size, host = c_size_t(data.nbytes), c_void_p()
        library, device = self.library, self.device.handle
        library.call("kernels_memory_create", device, c_int(PINNED), size, byref(host))
        order = torch.randperm(pages, device=self.torch_device).int()
        first = c_void_p(library.dll.kernels_pool_pages(pool.handle))
        name = "kernels_pages_gather" if to_host else "kernels_pages_scatter"
        ends = (host, first) if to_host else (first, host)

        def run(_, alive=(pool, order)):
            if paged:
                at = c_void_p(order.data_ptr())
                library.call(name, device, pool.handle, at, c_uint32(pages), host, self.stream())
            else:
                library.call("kernels_copy", device, *ends, size, self.stream())

        free = library.dll.kernels_memory_destroy
        weakref.finalize(run, lambda parent: free(device, c_int(PINNED), host), self.device)
        return Call(run)

    def checksums(self, pages):
        pool, _ = self.pool(pages)
        order = torch.randperm(pages, device=self.torch_device).int()
        sums = torch.empty(pages, device=self.torch_device, dtype=torch.int64)
        at, to = c_void_p(order.data_ptr()), c_void_p(sums.data_ptr())

        def run(_, alive=(pool, order, sums)):
            self.library.call(
                "kernels_pages_checksum",
                self.device.handle,
                pool.handle,
                at,
                c_uint32(pages),
                to,
                self.stream(),
            )

        return Call(run)

    def error(self, kind, batch, tokens, window, rows):
        """Relative error against fp32 over all requests and heads."""
        run, (q, data, order, lists, out) = self.attention(kind, batch, tokens, window, rows, 2)
        run(1)
        expected = torch.empty_like(q, dtype=torch.float32)
        at = 0
        for number, head in enumerate(lists.heads):
            request, kv_head = divmod(number, op.KV_HEADS)
            pages = data[order[1][at : at + len(head)]]
            at += len(head)
            k, v = (pages[:, i].reshape(-1, op.DIM).float() for i in (0, 1))
            device = data.device
            c = torch.cat([torch.arange(p, p + op.PAGE, device=device) for p in head])[None]
            t = torch.arange(tokens - rows, tokens, device=device)[:, None]
            seen = (c <= t) & ((c > t - window) | (c < op.SINK)) if window and kv_head else c <= t
            mine = slice(request * rows, (request + 1) * rows)
            group = slice(kv_head * op.GROUP, (kv_head + 1) * op.GROUP)
            scores = torch.einsum("rgd,cd->grc", q[mine, group].float(), k) * op.SCALE
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            expected[mine, group] = torch.einsum("grc,cd->rgd", weights, v)
        return op.relative_error(out, expected)

    def checks(self):
        """(shape, function that returns the error); lengths that end inside a page."""
        for kind, name, *shape in (
            (PREFILL, "prefill S700", 1, 700, 0, 700),
            (PREFILL, "prefill S700 W128", 1, 700, 128, 700),
            (PREFILL, "chunk of 200 at 1000, W256", 2, 1000, 256, 200),
            (DECODE, "decode B3 L1500", 3, 1500, 0, 1),
            (DECODE, "decode B3 L1500 W256", 3, 1500, 256, 1),
        ):
            yield name, lambda k=kind, s=shape: self.error(k, *s)
