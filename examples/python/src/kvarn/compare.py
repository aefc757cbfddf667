# SPDX-License-Identifier: Apache-2.0
"""What formats lose on given K, V and queries: the measures and the table of `kvarn compare`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import _work
from ._arrays import ArrayLike, Values, as_float
from .codec import Encoding, choose_format, dequantize, quantize
from .formats import Format

FloatArray = npt.NDArray[np.float32]


class Spread(NamedTuple):
    """Of token-scale errors | |x'| / |x| - 1 | over all tokens and heads."""

    mean: float
    p99: float
    worst: float


@dataclasses.dataclass(frozen=True)
class Method:
    """One format with one encoder. What does not apply is NaN."""

    name: str
    encoder: str
    formats: tuple[Format, ...]  #: of each KV head
    bits_per_element: float  #: scales included
    bytes: int
    k_error: float  #: |K - K'| / |K|
    k_scale: Spread
    k_magnitude: float  #: share of the squared error that lies in token norms
    v_error: float
    v_scale: Spread
    v_magnitude: float
    attention_error: float  #: of the output of causal attention


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found. str() is the table that `kvarn compare` prints."""

    methods: tuple[Method, ...]
    tokens: int
    all_tokens: int
    heads: int
    query_heads: int
    query_step: int
    head_dim_k: int
    head_dim_v: int

    def __getitem__(self, name: str) -> Method:
        """The first method of that name, "k4v2_g128" or "paper k4v2_g128"."""
        for method in self.methods:
            if name in (method.name, f"{method.encoder} {method.name}"):
                return method
        raise KeyError(name)

    def __str__(self) -> str:
        exact = self.heads * self.tokens * (self.head_dim_k + self.head_dim_v) * 2
        lines = [
            f"{self.tokens} of {self.all_tokens} tokens, {self.heads} head{'' if self.heads == 1 else 's'}, "
            f"head_dim "
            f"{self.head_dim_k} (K) and {self.head_dim_v} (V); float16 would take {exact:,} bytes"
        ]
        if self.query_heads:
            every = (
                "every query"
                if self.query_step == 1
                else f"one query in {self.query_step} (the others left out for speed)"
            )
            lines.append(f"attention: {self.query_heads} query heads on {self.heads}, causal, {every}")
        lines.append(
            "rel error: ||X - X'|| / ||X||; scale: token-scale error | ||x'|| / ||x|| - 1 | per token; "
            "magn.: share of the "
            "squared error that lies in token norms"
        )
        table = [
            [
                "",
                "bits per",
                "",
                "K rel",
                "K scale",
                "K scale",
                "K scale",
                "K",
                "V rel",
                "V scale",
                "V scale",
                "V scale",
                "V",
            ],
            [
                "method",
                "element",
                "bytes",
                "error",
                "mean",
                "p99",
                "worst",
                "magn.",
                "error",
                "mean",
                "p99",
                "worst",
                "magn.",
            ],
        ]
        if self.query_heads:
            table[0].append("attention")
            table[1].append("rel error")
        for m in self.methods:
            numbers = [m.k_error, *m.k_scale, m.k_magnitude, m.v_error, *m.v_scale, m.v_magnitude]
            if self.query_heads:
                numbers.append(m.attention_error)
            table.append(
                [
                    f"kvarn/{m.encoder} {m.name}",
                    f"{m.bits_per_element:.4f}",
                    f"{m.bytes:,}",
                    *("-" if math.isnan(x) else f"{x:.4f}" for x in numbers),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*table)]
        rows = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]
            ).rstrip()
            for row in table
        ]
        return "\n".join([*lines, "", *rows])


def _relative_error(exact: FloatArray, decoded: FloatArray) -> float:
    norm = float(np.sum(np.square(exact, dtype=np.float64)))
    lost = float(np.sum(np.square(exact.astype(np.float64) - decoded)))
    return math.sqrt(lost / norm) if norm > 0 else (math.inf if lost > 0 else 0.0)


def _token_errors(exact: FloatArray, decoded: FloatArray) -> tuple[Spread, float]:
    """Token-scale errors, and the share of the squared error that lies in token norms."""
    x, y = exact.astype(np.float64), decoded.astype(np.float64)
    norm, norm_decoded = np.sqrt(np.sum(x * x, -1)), np.sqrt(np.sum(y * y, -1))
    errors = np.sort(np.abs(norm_decoded[norm > 0] / norm[norm > 0] - 1))
    spread = Spread(0.0, 0.0, 0.0)
    if errors.size:
        spread = Spread(
            float(errors.mean()), float(errors[math.ceil(0.99 * errors.size) - 1]), float(errors[-1])
        )
    lost = float(np.sum((x - y) ** 2))
    return spread, float(np.sum((norm - norm_decoded) ** 2)) / lost if lost > 0 else 0.0


def _attention(q: FloatArray, k: FloatArray, v: FloatArray, step: int) -> FloatArray:
    """Causal attention of every step-th query, the newest included: [query heads, queries, head_dim_v]."""
    tokens, rows = k.shape[1], q.shape[0] // k.shape[0]
    asked = np.arange((tokens - 1) % step, tokens, step)
    out = np.empty((q.shape[0], asked.size, v.shape[2]), np.float32)
    for head in range(q.shape[0]):
        for first in range(0, asked.size, 512):
            at = asked[first : first + 512]
            scores = q[head, at] @ k[head // rows].T / np.float32(math.sqrt(k.shape[2]))
            scores[np.arange(tokens) > at[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[head, first : first + 512] = weights @ v[head // rows] / weights.sum(-1, keepdims=True)
    return out


def _default_formats(with_queries: bool) -> list[str]:
    if with_queries:
        return [
            "k2v2_g128_auto",
            "k2v2_g128",
            "k3v2_g128_auto",
            "k4v2_g128_auto",
            "k4v4_g128_auto",
            "k4v4_g128",
            "k8v8_g128",
        ]
    return ["k2v2_g128", "k3v3_g128", "k4v2_g128", "k4v4_g128", "k8v8_g128"]


def compare(
    k: ArrayLike,
    v: ArrayLike,
    formats: Iterable[str | Format] | None = None,
    q: ArrayLike | None = None,
    *,
    encoders: Iterable[str | Encoding] = ("refined", "paper"),
    query_step: int | None = None,
    threads: _work.Threads = 1,
) -> Comparison:
    """What formats lose on K [KV heads, tokens, head_dim], V [KV heads, tokens, head_dim_v] and, with queries
    q [query heads, tokens, head_dim], on the output of causal attention. print() it for the table of `kvarn
    compare`.

    formats: names or Formats; a name that ends in _auto lets each head choose the bases of its keys and
    values from its first tile and the queries of that tile. Queries are as they meet K, query heads of a
    group in a row. Whole tiles of the largest group are measured. query_step: attention of every so many-th
    query; None: as many as take about a second.
    """
    values_k, values_v = Values(k, "k"), Values(v, "v")
    if (values_k.heads, values_k.tokens) != (values_v.heads, values_v.tokens):
        raise ValueError(
            f"v: {values_v.heads} heads of {values_v.tokens} tokens, but k has "
            f"{values_k.heads} of {values_k.tokens}"
        )
    values_q = None if q is None else Values(q, "q")
    if values_q is not None and (
        values_q.heads == 0
        or values_q.heads % values_k.heads
        or values_q.tokens != values_k.tokens
        or values_q.channels != values_k.channels
    ):
        raise ValueError(
            f"q: expected [a multiple of {values_k.heads}, {values_k.tokens}, {values_k.channels}], "
            f"got the shape "
            f"{values_q.array.shape}"
        )
    for values in (values_k, values_v, values_q):
        if values is not None and values.not_finite():
            raise ValueError(f"{values.name}: has values that are not finite")

    candidates: list[tuple[str, Format, bool]] = []
    for asked in _default_formats(q is not None) if formats is None else formats:
        if isinstance(asked, Format):
            candidates.append((asked.name, asked, False))
            continue
        name = str(asked)
        if name.endswith("_auto") and q is None:
            raise ValueError(f"q: is missing; the queries are what {name} chooses a basis by")
        candidates.append(
            (
                name,
                Format(name.removesuffix("_auto"), values_k.channels, head_dim_v=values_v.channels),
                name.endswith("_auto"),
            )
        )
    if not candidates:
        raise ValueError("formats: none")
    for name, format, _ in candidates:
        if format.exact_channels:
            raise ValueError(f"formats: {name}: exact channels lose nothing; leave them out of k")
    group = max(128, *(format.group for _, format, _ in candidates))
    tokens = values_k.tokens // group * group
    if tokens == 0:
        raise ValueError(f"k: {values_k.tokens} tokens are too few, the largest group needs {group}")
    # As the command: everything in float32, once.
    exact_k, exact_v = (
        np.ascontiguousarray(as_float(x)[:, :tokens]) for x in (values_k.array, values_v.array)
    )
    exact_q = None if values_q is None else np.ascontiguousarray(as_float(values_q.array)[:, :tokens])
    step, exact_out = 1, None
    if exact_q is not None:
        step = query_step or max(1, math.ceil(exact_q.shape[0] * tokens * tokens / 2 / 3e6))
        exact_out = _attention(exact_q, exact_k, exact_v, step)

    methods = []
    for encoder in encoders:
        encoding = encoder if isinstance(encoder, Encoding) else Encoding(encoder)
        for name, format, chooses in candidates:
            of_heads = [format] * exact_k.shape[0]
            if chooses:
                assert exact_q is not None
                first = slice(0, format.group)
                of_heads = choose_format(
                    format,
                    exact_k[:, first],
                    exact_v[:, first] if format.has_values else None,
                    exact_q[:, first],
                    encoder=encoding,
                )
            records = quantize(
                of_heads, exact_k, exact_v if format.has_values else None, encoder=encoding, threads=threads
            )
            k_decoded, v_decoded = dequantize(records, threads=threads)
            k_scale, k_magnitude = _token_errors(exact_k, k_decoded)
            nothing = Spread(math.nan, math.nan, math.nan)
            v_error, v_scale, v_magnitude, attention_error = math.nan, nothing, math.nan, math.nan
            if v_decoded is not None:
                v_error = _relative_error(exact_v, v_decoded)
                v_scale, v_magnitude = _token_errors(exact_v, v_decoded)
                if exact_q is not None and exact_out is not None:
                    attention_error = _relative_error(
                        exact_out, _attention(exact_q, k_decoded, v_decoded, step)
                    )
            methods.append(
                Method(
                    name,
                    encoding.encoder,
                    tuple(of_heads),
                    format.bits_per_element,
                    records.nbytes,
                    _relative_error(exact_k, k_decoded),
                    k_scale,
                    k_magnitude,
                    v_error,
                    v_scale,
                    v_magnitude,
                    attention_error,
                )
            )
    return Comparison(
        tuple(methods),
        tokens,
        values_k.tokens,
        values_k.heads,
        0 if values_q is None else values_q.heads,
        step,
        values_k.channels,
        values_v.channels,
    )
