# SPDX-License-Identifier: Apache-2.0
"""Attention of new queries over records and exact tokens, which stay as they are."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from . import _work
from ._arrays import ArrayLike, Values, address, float_row, new_values
from ._c import SIZE_MAX, CAttentionOptions, CSegment, CTask, Status, check, lib
from .codec import Records, _pair
from .formats import Format, basis_number, precision_number


@dataclasses.dataclass(frozen=True, eq=False)
class ExactTokens:
    """Consecutive tokens that are not quantized: k [KV heads, tokens, channels], v [KV heads, tokens,
    head_dim_v].

    v is None without a V part. position: of the first token; None: behind the segment before.
    """

    k: ArrayLike
    v: ArrayLike | None = None
    position: int | None = None
    key_basis: str = "original"
    value_basis: str = "original"


@dataclasses.dataclass(frozen=True, eq=False)
class SealedTokens:
    """Tokens [first, last) of a grid of records, wherever in a tile they begin and end; None: to the end.

    position: of the first token; None: behind the segment before.
    """

    records: Records
    first: int = 0
    last: int | None = None
    position: int | None = None


#: Part of a history. A pair (k, v) is ExactTokens(k, v).
Segment = Union[Records, SealedTokens, ExactTokens, tuple[ArrayLike, ...]]


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """softmax_scale: factor on <q, k>, 0 for 1 / sqrt(channels); soft_cap: s <- cap * tanh(s / cap), 0 for
    none; window: a query sees so many newest positions up to its own, 0 for all; query_basis, output_basis:
    "rotated" as in the records; precision of products with codes: "exact" (about 1e-5), "fine" (below 1e-3)
    or "fast" (about 1e-2); fast_bound: with "fast", the standard deviation that 8-bit weights of K may give a
    score.
    """

    softmax_scale: float = 0.0
    soft_cap: float = 0.0
    window: int = 0
    causal: bool = True
    query_basis: str = "original"
    output_basis: str = "original"
    precision: str = "fine"
    fast_bound: float = 0.03

    def _make(self) -> CAttentionOptions:
        return CAttentionOptions(
            softmax_scale=self.softmax_scale,
            logit_soft_cap=self.soft_cap,
            window=self.window,
            causal=int(self.causal),
            query_basis=basis_number(self.query_basis, "query_basis"),
            output_basis=basis_number(self.output_basis, "output_basis"),
            precision=precision_number(self.precision),
            fast_bound=self.fast_bound,
        )


def mask_words(mask: Any, rows: int) -> npt.NDArray[np.uint64] | None:
    """bool [new tokens, newest positions], True: sees; the last column is the newest position. As the
    library's bits.
    """
    if mask is None:
        return None
    seen = np.asarray(mask)
    if seen.dtype != np.bool_ or seen.ndim != 2 or seen.shape[0] != rows:
        raise ValueError(f"mask: expected bool [{rows}, newest positions], got {seen.dtype} {seen.shape}")
    words = np.zeros((rows, max(1, -(-seen.shape[1] // 64))), np.uint64)
    for position in range(seen.shape[1]):
        words[:, position // 64] |= seen[:, position].astype(np.uint64) << np.uint64(position % 64)
    return words


def output_of(out: ArrayLike | None, name: str, heads: int, tokens: int, channels: int) -> tuple[Any, Values]:
    if out is None:
        out = new_values(heads, tokens, channels, np.float32)
    values = Values(out, name, writable=True)
    if values.array.shape != (heads, tokens, channels):
        raise ValueError(f"{name}: expected {(heads, tokens, channels)}, got the shape {values.array.shape}")
    return out, values


def attend(
    q: ArrayLike,
    history: Sequence[Segment] | Segment,
    *,
    format: Format | None = None,
    softmax_scale: float = 0.0,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    sink_logits: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    mask: Any = None,
    first_position: int | None = None,
    query_basis: str = "original",
    output_basis: str = "original",
    precision: str = "fine",
    fast_bound: float = 0.03,
    log_sum_exp: bool = False,
    out: ArrayLike | None = None,
    threads: _work.Threads = 1,
) -> Any:
    """Attention of the queries q [query heads, new tokens, channels] to a history, all KV heads at once.

    history: segments in the order of positions: Records, (k, v) of exact tokens [KV heads, tokens, channels],
    SealedTokens, ExactTokens; the new tokens are at its end. Query heads are a multiple of KV heads; those of
    a group are in a row. Returns the output [query heads, new tokens, head_dim_v] as float32, or `out`,
    written to; with log_sum_exp a pair of it and the natural logarithm of the sum of exp(score), float32
    [query heads, new tokens].

    format: of the queries, where there are no records. sink_logits: [query heads], logits without a value.
    alibi_slopes: [query heads]. mask: bool [new tokens, n], what each new token sees of the n newest
    positions, in place of the causal mask. first_position: of the first query; None: the new tokens are the
    newest positions. The rest as for AttentionOptions. The same bits for any number of threads.
    """
    queries = Values(q, "q")
    if isinstance(history, (Records, SealedTokens, ExactTokens)) or (
        isinstance(history, tuple)
        and history
        and not isinstance(history[0], (Records, SealedTokens, ExactTokens, tuple))
    ):
        history = [history]
    parts: list[Records | SealedTokens | ExactTokens] = []
    for i, part in enumerate(history):
        if isinstance(part, tuple):
            if len(part) not in (1, 2):
                raise TypeError(f"history[{i}]: expected (k, v)")
            part = ExactTokens(*part)
        if not isinstance(part, (Records, SealedTokens, ExactTokens)):
            raise TypeError(
                f"history[{i}]: expected Records, SealedTokens, ExactTokens or (k, v), not "
                f"{type(part).__name__}"
            )
        parts.append(part)

    grids = [
        part.records if isinstance(part, SealedTokens) else part
        for part in parts
        if not isinstance(part, ExactTokens)
    ]
    if grids:
        formats = grids[0].formats
        if format is not None and format not in formats:
            raise ValueError(f"format: {format} is not that of the records")
    elif format is not None:
        formats = (format,)
    else:
        raise ValueError("format: is needed where the history has no records")
    first = formats[0]
    if queries.channels != first.key_channels:
        raise ValueError(f"q: {queries.channels} channels, {first} has {first.key_channels}")

    # Everything that the library looks at lives until the end of this function.
    exact: list[tuple[Values, Values | None] | None] = []
    kv_heads = None
    for i, part in enumerate(parts):
        if isinstance(part, ExactTokens):
            pair = _pair(first, part.k, part.v, tiles=False, names=(f"history[{i}].k", f"history[{i}].v"))
            assert pair[0] is not None
            if pair[1] is None and first.has_values:
                raise ValueError(f"history[{i}].v: is missing, {first.name} has a V part")
            exact.append((pair[0], pair[1]))
            heads = pair[0].heads
        else:
            exact.append(None)
            grid = part.records if isinstance(part, SealedTokens) else part
            heads = grid.heads
            if grid.formats != formats:
                raise ValueError(f"history[{i}]: {grid} has other formats than the records before")
        if kv_heads is not None and heads != kv_heads:
            raise ValueError(f"history[{i}]: {heads} KV heads, the segments before have {kv_heads}")
        kv_heads = heads
    if not kv_heads:
        raise ValueError("history: is empty")
    if queries.heads % kv_heads or queries.heads == 0:
        raise ValueError(f"q: {queries.heads} query heads are no multiple of {kv_heads} KV heads")
    formats = formats if len(formats) == kv_heads else (first,) * kv_heads
    rows, m = queries.heads // kv_heads, queries.tokens
    out, outputs = output_of(out, "out", queries.heads, m, first.head_dim_v)
    sums = np.empty((kv_heads, m, rows), np.float32) if log_sum_exp else None
    sinks = float_row(sink_logits, queries.heads, "sink_logits")
    slopes = float_row(alibi_slopes, queries.heads, "alibi_slopes")
    words = mask_words(mask, m)
    options = AttentionOptions(
        softmax_scale, soft_cap, window, causal, query_basis, output_basis, precision, fast_bound
    )._make()

    tasks = (CTask * kv_heads)()
    keep: list[Any] = []
    for head in range(kv_heads):
        segments = (CSegment * max(len(parts), 1))()
        for i, part in enumerate(parts):
            segments[i] = CSegment()
            segment = segments[i]
            if isinstance(part, ExactTokens):
                k, v = exact[i]  # type: ignore[misc]
                check(
                    lib.kvarn_exact_tokens(
                        ctypes.byref(k.view()),
                        None if v is None else ctypes.byref(v.view()),
                        head,
                        basis_number(part.key_basis, f"history[{i}].key_basis"),
                        basis_number(part.value_basis, f"history[{i}].value_basis"),
                        ctypes.byref(segment),
                    ),
                    "attend",
                    f"history[{i}]",
                )
                position = part.position
            else:
                grid = part.records if isinstance(part, SealedTokens) else part
                made = grid._grid()
                check(
                    lib.kvarn_sealed_tiles(
                        formats[head]._ref, ctypes.byref(made), head, 0, SIZE_MAX, ctypes.byref(segment)
                    ),
                    "attend",
                    f"history[{i}]",
                )
                position = None
                if isinstance(part, SealedTokens):
                    begin, end, _ = slice(part.first, part.last).indices(grid.tokens)
                    check(
                        lib.kvarn_segment_tokens(
                            formats[head]._ref, begin, max(end - begin, 0), ctypes.byref(segment)
                        ),
                        "attend",
                        f"history[{i}]",
                    )
                    position = part.position
            segment.position = -1 if position is None else position
        keep.append(segments)
        # The library's tokens x heads are [m][r] of one group.
        view_q, view_out = queries.view(head * rows, rows), outputs.view(head * rows, rows)
        tasks[head] = CTask(
            history=segments,
            history_count=len(parts),
            q=view_q,
            out=view_out,
            log_sum_exp=None if sums is None else address(sums, 4 * head * m * rows),
            sink_logits=address(sinks, 4 * head * rows),
            alibi_slopes=address(slopes, 4 * head * rows),
            first_position=-1 if first_position is None else first_position,
            format=ctypes.pointer(formats[head]._c),
            mask=address(words),
            mask_stride=0 if words is None else words.shape[1],
            mask_tokens=0 if words is None else np.asarray(mask).shape[1],
        )

    def blame(status: int) -> None:
        argument = None
        if status == Status.NOT_FINITE:
            argument = "q" if queries.not_finite() else "sink_logits" if sinks is not None else "q"
        check(status, "attend", argument)

    need = int(lib.kvarn_attention_bytes(first._ref, tasks, kv_heads))
    memory = np.empty(max(need, 1), np.uint8)
    batch = ctypes.c_void_p()
    blame(
        lib.kvarn_attention_plan(
            first._ref,
            tasks,
            kv_heads,
            ctypes.byref(options),
            0,
            address(memory),
            memory.size,
            ctypes.byref(batch),
        )
    )
    scratch_bytes = max(int(lib.kvarn_call_scratch_bytes(f._ref, m * rows)) for f in set(formats))
    _work.run(
        int(lib.kvarn_attention_items(batch)),
        scratch_bytes,
        threads,
        lambda item, scratch: blame(lib.kvarn_attend_item(batch, item, address(scratch), scratch.size)),
    )
    _work.run(
        kv_heads,
        scratch_bytes,
        threads,
        lambda task, scratch: blame(lib.kvarn_combine_item(batch, task, address(scratch), scratch.size)),
    )
    if sums is None:
        return out
    return out, np.ascontiguousarray(sums.transpose(0, 2, 1)).reshape(queries.heads, m)
