"""The attention kernels that ours is measured against; each function returns a timing.Call.

Shape: 32 query heads, 8 KV heads, head size 128, bf16; in head-class rows KV head 0 is global and
the others see a window and 4 sink tokens. Decoding has one query token for each request; a local
head then holds the window, the sink and one page more. "Two calls" is one for the global head and
one for the local heads; those have no sink in prefill, where the libraries offer none."""

import functools, os, time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from timing import Call

HEADS, KV_HEADS, DIM, PAGE, SINK = 32, 8, 128, 64, 4
PAGE_BYTES = 2 * PAGE * DIM * 2
GROUP = HEADS // KV_HEADS
SCALE = DIM**-0.5
ROTATE_BYTES = 1500e6  # K/V sets together: many times the L2 cache


# ---- What is counted ----


def pairs(tokens, window=None):
    """Visible (query, key) pairs of one query head."""
    full = min(tokens, window + SINK) if window else tokens
    return full * (full + 1) / 2 + (tokens - full) * full


def prefill_flop(tokens, window=None):
    mean = (pairs(tokens) + (KV_HEADS - 1) * pairs(tokens, window)) / KV_HEADS
    return 4 * HEADS * DIM * mean


def recovery_flop(again, window=None):
    """Queries at positions `again` only."""
    seen = lambda w: sum(min(t + 1, w + SINK) if w else t + 1 for t in again)
    mean = (seen(None) + (KV_HEADS - 1) * seen(window)) / KV_HEADS
    return 4 * HEADS * DIM * mean


def prefill_bytes(tokens):
    """Q, K, V and the output once, at any window."""
    return 2 * tokens * DIM * (2 * HEADS + 2 * KV_HEADS)


def decode_lengths(batch, tokens, window=None):
    """Keys of each request's KV heads: [batch * KV_HEADS]."""
    local = min(tokens, window + SINK + PAGE) if window else tokens
    return ([tokens] + [local] * (KV_HEADS - 1)) * batch


def decode_bytes(lengths):
    return 4 * DIM * sum(lengths)


def decode_flop(lengths):
    return 4 * GROUP * DIM * sum(lengths)


def sets_of(size):
    """How many sets of inputs to rotate over, each with so many bytes of K/V."""
    return max(2, min(16, int(ROTATE_BYTES // size) + 1))


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


# ---- cuDNN ----


def cudnn(q, k, v, causal=False):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


@functools.cache
def cudnn_handle():
    import cudnn as frontend

    return frontend.create_handle()


def cudnn_window(q, k, v, window):
    """cuDNN's sliding window, which torch does not offer, by cuDNN's own Python frontend.

    Returns run() and the output that each run writes."""
    import cudnn as frontend

    kind, handle = frontend.data_type, cudnn_handle()
    out = torch.empty_like(q)
    graph = frontend.pygraph(
        io_data_type=kind.BFLOAT16,
        intermediate_data_type=kind.FLOAT,
        compute_data_type=kind.FLOAT,
        handle=handle,
    )
    names = [
        graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=kind.BFLOAT16)
        for x in (q, k, v)
    ]
    result, _ = graph.sdpa(
        *names,
        attn_scale=SCALE,
        generate_stats=False,
        diagonal_alignment=frontend.diagonal_alignment.TOP_LEFT,
        diagonal_band_left_bound=window,  # keys that a query sees, itself among them
        diagonal_band_right_bound=0,
    )
    result.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    graph.build([frontend.heur_mode.A])
    space = torch.empty(max(1, graph.get_workspace_size()), device="cuda", dtype=torch.uint8)
    buffers = dict(zip([*names, result], (q, k, v, out)))

    def run():
        frontend.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(buffers, space, handle=handle)

    return run, out


def cudnn_prefill(tokens):
    q, k, v = (random(1, heads, tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return Call(lambda _: cudnn(q, k, v, causal=True))


def split_prefill(tokens):
    """(q, k, v) of the global head, then of the local heads."""
    for heads in (1, KV_HEADS - 1):
        yield [random(1, n, tokens, DIM) for n in (heads * GROUP, heads, heads)]


def cudnn_prefill_two_calls(tokens, window):
    whole, local = split_prefill(tokens)
    run, _ = cudnn_window(*local, window)
    return Call(lambda _: (cudnn(*whole, causal=True), run()))


def jax_prefill_two_calls(tokens, window):
    """The same by JAX, where the frontend is not installed; by the host's clock, over one jit."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax, jax.numpy as jnp

    count, key = (8 if tokens < 10000 else 3), iter(range(1000))
    normal = lambda heads: jax.random.normal(
        jax.random.key(next(key)), (1, tokens, heads, DIM), jnp.bfloat16
    )
    attention = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    )
    inputs = [
        [[normal(heads * GROUP), normal(heads), normal(heads)] for heads in (1, KV_HEADS - 1)]
        for _ in range(count)
    ]
    both = lambda whole, local: (
        attention(*whole),
        attention(*local, local_window_size=(window - 1, 0)),
    )
    all_of_them = jax.jit(lambda inputs: [both(*one) for one in inputs])

    def run(_):
        begin = time.perf_counter()
        jax.block_until_ready(all_of_them(inputs))
        return (time.perf_counter() - begin) / count * 1e6

    return Call(run, host=True)


def cudnn_decode(batch, tokens):
    count = sets_of(decode_bytes(decode_lengths(batch, tokens)))
    q = random(batch, HEADS, 1, DIM)
    sets = [[random(batch, KV_HEADS, tokens, DIM) for _ in "kv"] for _ in range(count)]
    return Call(lambda i: cudnn(q, *sets[i]), count)


def cudnn_decode_two_calls(batch, tokens, window):
    """Local heads on contiguous K/V of their few tokens: no pages, no copy counted."""
    lengths = decode_lengths(batch, tokens, window)
    count, local = sets_of(decode_bytes(lengths)), lengths[-1]
    whole_q, local_q = random(batch, GROUP, 1, DIM), random(batch, HEADS - GROUP, 1, DIM)
    sets = [
        (
            [random(batch, 1, tokens, DIM) for _ in "kv"],
            [random(batch, KV_HEADS - 1, local, DIM) for _ in "kv"],
        )
        for _ in range(count)
    ]
    return Call(lambda i: (cudnn(whole_q, *sets[i][0]), cudnn(local_q, *sets[i][1])), count)


# ---- FlashInfer ----


def page_table(lengths):
    """(indptr, pages in random order, tokens of each last page, number of pages)"""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + -(-length // PAGE))
    last = [(length - 1) % PAGE + 1 for length in lengths]
    ints = functools.partial(torch.tensor, dtype=torch.int32, device="cuda")
    return ints(ends), torch.randperm(ends[-1], device="cuda").int(), ints(last), ends[-1]


def flashinfer_space():
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def flashinfer_paged(tokens, heads, window=None):
    """run(), its inputs and the order of the pages; fa3, so many KV heads."""
    import flashinfer

    indptr, order, last, pages = page_table([tokens])
    q, kv = random(tokens, heads * GROUP, DIM), tuple(random(pages, PAGE, heads, DIM) for _ in "kv")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        flashinfer_space(), "NHD", backend="fa3"
    )
    wrapper.plan(
        torch.tensor([0, tokens], dtype=torch.int32, device="cuda"),
        indptr,
        order,
        last,
        heads * GROUP,
        heads,
        DIM,
        PAGE,
        causal=True,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
        window_left=window - 1 if window else -1,
    )
    out = torch.empty_like(q)
    return (lambda: wrapper.run(q, kv, out=out)), q, kv, order, out


def flashinfer_prefill(tokens):
    run, *_ = flashinfer_paged(tokens, KV_HEADS)
    return Call(lambda _: run())


def flashinfer_prefill_two_calls(tokens, window):
    whole, *_ = flashinfer_paged(tokens, 1)
    local, *_ = flashinfer_paged(tokens, KV_HEADS - 1, window)
    return Call(lambda _: (whole(), local()))


def flashinfer_decode(lengths, tensor_cores=True):
    """Each KV head of each request is a sequence with one KV head: every head has its own pages."""
    import flashinfer

    indptr, order, last, pages = page_table(lengths)
    count = sets_of(decode_bytes(lengths))
    q = random(len(lengths), GROUP, DIM)
    out = torch.empty_like(q)
    sets = [tuple(random(pages, PAGE, 1, DIM) for _ in "kv") for _ in range(count)]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        flashinfer_space(),
        "NHD",
        use_tensor_cores=tensor_cores,
        **({"backend": "fa2"} if tensor_cores else {}),
    )
    wrapper.plan(
        indptr, order, last, GROUP, 1, DIM, PAGE, q_data_type=q.dtype, kv_data_type=q.dtype
    )
    return Call(lambda i: wrapper.run(q, sets[i], out=out), count)


# ---- flex_attention ----


def flex_blocks(tokens, window, is_global, mask, block=128):
    """Exact lists of partly and wholly visible blocks; create_block_mask would need S x S bytes."""
    from torch.nn.attention.flex_attention import BlockMask

    n = tokens // block
    i, j = torch.arange(n, device="cuda")[:, None], torch.arange(n, device="cuda")[None]
    near, far = (i - j) * block - (block - 1), (i - j) * block + block - 1
    whole = is_global[:, None, None]
    some = torch.where(whole, j <= i, (j <= i) & ((near < window) | (j == 0)))
    full = torch.where(whole, j < i, (j < i) & (far < window))

    def lists(blocks):
        order = torch.argsort(blocks.byte(), dim=-1, descending=True, stable=True)
        return blocks.sum(-1).int()[None].contiguous(), order.int()[None].contiguous()

    return BlockMask.from_kv_blocks(
        *lists(some & ~full),
        *lists(full),
        BLOCK_SIZE=block,
        mask_mod=mask,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )


@functools.cache
def flex_compiled():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def flex_prefill(tokens, window):
    """One call with a mask by head, and with the sink."""
    q, k, v = (random(1, heads, tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    is_global = torch.arange(HEADS, device="cuda") < GROUP

    def mask(_, head, i, j):
        return (i >= j) & (is_global[head] | (i - j < window) | (j < SINK))

    blocks = flex_blocks(tokens, window, is_global, mask)
    return Call(lambda _: flex_compiled()(q, k, v, block_mask=blocks, enable_gqa=True))


# ---- Checks against fp32 ----


def reference(q, k, v, window=None, sink=0):
    """fp32; q [heads][tokens][DIM], k and v [KV heads][tokens][DIM]."""
    i, j = (torch.arange(q.shape[1], device=q.device)[x] for x in ((..., None), None))
    seen = (i >= j) & ((i - j < (window or 1 << 30)) | (j < sink))
    k, v = (x.float().repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    return F.scaled_dot_product_attention(q.float(), k, v, attn_mask=seen)


def relative_error(out, expected):
    return ((out.float() - expected).norm() / expected.norm()).item()


def check_cudnn_window():
    q, k, v = (random(1, heads, 2048, DIM) for heads in (8, 2, 2))
    run, out = cudnn_window(q, k, v, 300)
    run()
    return relative_error(out[0], reference(q[0], k[0], v[0], 300))


def check_flashinfer_window():
    run, q, kv, order, out = flashinfer_paged(2048, 2, 300)
    run()
    k, v = (x[order.long()].reshape(2048, 2, DIM).transpose(0, 1) for x in kv)
    return relative_error(out.transpose(0, 1), reference(q.transpose(0, 1), k, v, 300))
