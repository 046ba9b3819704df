"""The small operations of a decode step as Triton kernels: what surrounds a layer's seven 4-bit matrix products.

With a few rows a step is bound by the number of kernels it launches, not by what they compute, so each of these does as
much as can be done in one pass. All sums are in float32; what is stored is rounded once. Shapes: H hidden size, D size
of a head, R ranks of all adapters together, L room in the cache.
"""

# Triton takes names for types and annotations for constants, so these functions are checked by their tests alone.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def rms_norm(h, weight, out, eps, H: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = h[row] / rms(h[row]) * weight, rounded before the product, as transformers does."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < H
    values = tl.load(h + row * H + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / H + eps)
    normed = (values * scale).to(out.dtype.element_ty)
    tl.store(out + row * H + at, normed * tl.load(weight + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def lora_down(
    x, a, scale, out, count, K: tl.constexpr, J: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[row, j, part] = scale[row, j mod R] * (x[row] . a[j]) over part of K; x (count, K), a (J, K).

    J is R times the matrices that share x. K is cut into parts of BLOCK, one program each for ROWS rows, so that enough
    of them are under way to hide the memory's latency; who reads adds them up.
    """
    j, part = tl.program_id(0), tl.program_id(1)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    at = part * BLOCK + tl.arange(0, BLOCK)
    weights = tl.load(a + j * K + at, mask=at < K, other=0.0).to(tl.float32)
    inside = (rows < count)[:, None] & (at < K)[None, :]
    inputs = tl.load(x + rows[:, None] * K + at[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(inputs * weights[None, :], axis=1) * tl.load(scale + rows * R + j % R, mask=rows < count, other=0.0)
    tl.store(out + (rows * J + j) * tl.num_programs(1) + part, total, mask=rows < count)


@triton.jit
def _lora_up(down, b, at, inside, R: tl.constexpr, PARTS: tl.constexpr):
    """down (R, PARTS), summed over its parts, through rows `at` of b (N, R): the adapter's share of those outputs."""
    ranks = tl.arange(0, R)
    inner = tl.sum(tl.load(down + ranks[:, None] * PARTS + tl.arange(0, PARTS)[None, :]), axis=1)
    weights = tl.load(b + at[:, None] * R + ranks[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    return tl.sum(weights * inner[None, :], axis=1)


@triton.jit
def add_output(h, y, down, b, N: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """h += y + adapter: the end of attention and of the MLP. h and y (rows, N); down (rows, R, PARTS); b (N, R)."""
    at, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    inside = at < N
    total = tl.load(y + row * N + at, mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        total += _lora_up(down + row * R * PARTS, b, at, inside, R, PARTS)
    total += tl.load(h + row * N + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * N + at, total.to(h.dtype.element_ty), mask=inside)


@triton.jit
def gated(gate, up, down, b, out, N: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out = silu(gate + adapter) * (up + adapter), each (rows, N); down (rows, 2 R, PARTS); b (2 N, R)."""
    at, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    inside = at < N
    g = tl.load(gate + row * N + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * N + at, mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        g += _lora_up(down + row * 2 * R * PARTS, b, at, inside, R, PARTS)
        u += _lora_up(down + (row * 2 * R + R) * PARTS, b + N * R, at, inside, R, PARTS)
    tl.store(out + row * N + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_cache(
    q, k, v, down, b, cos, sin, length, start, rotated, keys, values, L,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Add the adapters to q, k and v, turn q and k by their positions, and put k and v into the cache at `length`.

    One program a row and head: the heads of q first, then of k, then of v. q, k, v (rows, heads * D); down (rows, 3 R,
    PARTS); b (heads of all three * D, R); cos and sin (positions, D), of whose halves the first is used, since both are
    the same; `start` is each row's padding; rotated (rows, HEADS, D); keys and values (rows, KV_HEADS, L, D). HALF is
    D / 2, and a power of 2.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, HALF)
    inside = at < HALF
    place = tl.load(length)
    cached = (row.to(tl.int64) * KV_HEADS * L + place) * D
    if head < HEADS:
        source, target = q + (row * HEADS + head) * D, rotated + (row * HEADS + head) * D
    elif head < HEADS + KV_HEADS:
        kv_head = head - HEADS
        source, target = k + (row * KV_HEADS + kv_head) * D, keys + cached + kv_head * L * D
    else:
        kv_head = head - HEADS - KV_HEADS
        source, target = v + (row * KV_HEADS + kv_head) * D, values + cached + kv_head * L * D
    low = tl.load(source + at).to(tl.float32)
    high = tl.load(source + HALF + at).to(tl.float32)
    if R > 0:
        which = tl.where(head < HEADS, 0, tl.where(head < HEADS + KV_HEADS, 1, 2))
        mine = down + (row * 3 + which) * R * PARTS
        low += _lora_up(mine, b + head * D * R, at, inside, R, PARTS)
        high += _lora_up(mine, b + (head * D + HALF) * R, at, inside, R, PARTS)
    kind = rotated.dtype.element_ty
    low, high = low.to(kind).to(tl.float32), high.to(kind).to(tl.float32)
    position = place - tl.load(start + row)
    c = tl.load(cos + position * D + at).to(tl.float32)
    s = tl.load(sin + position * D + at).to(tl.float32)
    if head < HEADS + KV_HEADS:
        low, high = low * c - high * s, high * c + low * s
    tl.store(target + at, low.to(kind))
    tl.store(target + HALF + at, high.to(kind))


@triton.jit
def attend(
    q, keys, values, length, start, partial, peaks, sums, L, scaling,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_UP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Attention of one query a row over its part of the cache, the cache cut into SPLITS parts that `combine` joins.

    A softmax over parts, each with its own peak (flash decoding, arXiv:2205.14135 section 3.1 over the key axis). One
    program a row, key head and part, for the GROUP query heads that share the key head (GROUP_UP: rounded up to a power
    of 2). partial (ROWS, HEADS, SPLITS, D), peaks and sums (ROWS, HEADS, SPLITS), all float32.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = tl.arange(0, GROUP_UP)
    at = tl.arange(0, D)
    count = tl.load(length) + 1
    share = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK) * BLOCK
    first = tl.maximum(split * share, tl.load(start + row) // BLOCK * BLOCK)
    last = tl.minimum(split * share + share, count)
    head = kv_head * GROUP + group
    shared = group < GROUP
    query = tl.load(q + ((row * KV_HEADS * GROUP + head) * D)[:, None] + at[None, :], mask=shared[:, None], other=0.0)
    query = query.to(tl.float32) * scaling
    peak = tl.full((GROUP_UP,), -1e30, tl.float32)
    total = tl.zeros((GROUP_UP,), tl.float32)
    out = tl.zeros((GROUP_UP, D), tl.float32)
    base = (row.to(tl.int64) * KV_HEADS + kv_head) * L * D  # many long rows have more than 2**31 numbers
    for begin in range(first, last, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        seen = (places < last) & (places >= tl.load(start + row))
        tile = base + (places * D)[:, None] + at[None, :]
        key = tl.load(keys + tile, mask=seen[:, None], other=0.0).to(tl.float32)
        scores = tl.sum(query[:, None, :] * key[None, :, :], axis=2)
        scores = tl.where(seen[None, :], scores, -1e30)
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(peak - higher)
        value = tl.load(values + tile, mask=seen[:, None], other=0.0).to(tl.float32)
        out = out * shrink[:, None] + tl.sum(weights[:, :, None] * value[None, :, :], axis=1)
        total = total * shrink + tl.sum(weights, axis=1)
        peak = higher
    slot = (row * KV_HEADS * GROUP + head) * SPLITS + split
    tl.store(partial + (slot * D)[:, None] + at[None, :], out, mask=shared[:, None])
    tl.store(peaks + slot, peak, mask=shared)
    tl.store(sums + slot, total, mask=shared)


@triton.jit
def combine(partial, peaks, sums, out, D: tl.constexpr, SPLITS: tl.constexpr):
    """Join the parts of `attend`: one program a row and head; out (ROWS, HEADS, D)."""
    slot = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    at = tl.arange(0, D)
    peak = tl.load(peaks + slot * SPLITS + splits)
    weight = tl.exp(peak - tl.max(peak, axis=0))
    total = tl.sum(weight * tl.load(sums + slot * SPLITS + splits), axis=0)
    parts = tl.load(partial + ((slot * SPLITS + splits) * D)[:, None] + at[None, :])
    joined = tl.sum(weight[:, None] * parts, axis=0) / total
    tl.store(out + slot * D + at, joined.to(out.dtype.element_ty))
