# SPDX-License-Identifier: Apache-2.0
"""Attention over records and exact tokens, against a softmax in float64 over the decoded values."""

from __future__ import annotations

import numpy as np
import pytest

import kvarn
from kvarn._arrays import as_float

KV_HEADS, ROWS, M, DIM = 2, 3, 4, 64


def reference(q, k, v, *, window=0, cap=0.0, causal=True, sinks=None, slopes=None, seen=None, first=None):
    """Output and log-sum-exp; positions of the history begin at 0, the queries are the newest."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    tokens, m = k.shape[1], q.shape[1]
    first = tokens - m if first is None else first
    out, sums = np.zeros((q.shape[0], m, v.shape[2])), np.zeros((q.shape[0], m))
    for head in range(q.shape[0]):
        s = q[head] @ k[head // (q.shape[0] // k.shape[0])].T / np.sqrt(q.shape[2])
        s = cap * np.tanh(s / cap) if cap else s
        key, query = np.arange(tokens), first + np.arange(m)[:, None]
        if slopes is not None:
            s = s + slopes[head] * (key - query)
        hidden = (key > query) & causal
        if seen is not None:
            hidden[:, tokens - seen.shape[1] :] = ~seen
        if window:
            hidden = hidden | (key <= query - window)
        s = np.where(hidden, -np.inf, s)
        if sinks is not None:
            s = np.concatenate([s, np.full((m, 1), sinks[head])], 1)
        most = s.max(1, keepdims=True)
        p = np.exp(s - most)
        sums[head] = most[:, 0] + np.log(p.sum(1))
        out[head] = (p / p.sum(1, keepdims=True))[:, :tokens] @ v[head // (q.shape[0] // k.shape[0])]
    return out, sums


@pytest.fixture
def history(values):
    """A sink, records and a tail; the whole history as attention sees it; queries."""
    f = kvarn.Format("k4v4_g64", DIM)
    k, v = values(KV_HEADS, 10 + 20 * 64 + 37, DIM), values(KV_HEADS, 10 + 20 * 64 + 37, DIM, 2)
    middle = slice(10, 10 + 20 * 64)
    records = kvarn.quantize(f, k[:, middle], v[:, middle])
    k[:, middle], v[:, middle] = kvarn.dequantize(records)
    segments = [(k[:, :10], v[:, :10]), records, kvarn.ExactTokens(k[:, middle.stop :], v[:, middle.stop :])]
    q = np.random.default_rng(4).standard_normal((KV_HEADS * ROWS, M, DIM)).astype(np.float32)
    return f, segments, k, v, q


def close(got, expected, tolerance=2e-4):
    assert np.linalg.norm(got[0] - expected[0]) < tolerance * np.linalg.norm(expected[0])
    assert np.abs(got[1] - expected[1]).max() < 2e-3
    return True


def test_against_a_softmax(history):
    f, segments, k, v, q = history
    sinks, slopes = np.linspace(-1, 3, 6), np.linspace(0, 0.05, 6)
    seen = np.tril(np.ones((M, M), bool))
    seen[3, 1] = False
    for arguments, same in (
        (dict(), dict()),
        (dict(window=700), dict(window=700)),
        (dict(soft_cap=3.0), dict(cap=3.0)),
        (dict(causal=False), dict(causal=False)),
        (dict(sink_logits=sinks), dict(sinks=sinks)),
        (dict(alibi_slopes=slopes), dict(slopes=slopes)),
        (dict(mask=seen), dict(seen=seen)),
        (dict(first_position=500), dict(first=500)),
    ):
        got = kvarn.attend(q, segments, precision="exact", log_sum_exp=True, **arguments)
        assert got[0].shape == (6, M, DIM) and got[1].shape == (6, M)
        close(got, reference(q, k, v, **same))
    fine = kvarn.attend(q, segments, log_sum_exp=True)
    close(fine, reference(q, k, v), 2e-3)
    assert kvarn.attend(q, segments, softmax_scale=1 / 8).tobytes() == fine[0].tobytes()


def test_same_bits_for_any_threads_order_and_strides(history):
    f, segments, k, v, q = history
    expected = kvarn.attend(q, segments)
    assert np.array_equal(kvarn.attend(q, segments, threads=3), expected)
    strided = np.ascontiguousarray(q.transpose(1, 0, 2)).transpose(1, 0, 2)
    out = np.zeros((M, 6, DIM), np.float32)
    returned = kvarn.attend(strided, segments, out=out.transpose(1, 0, 2))
    assert np.shares_memory(returned, out) and np.array_equal(returned, expected)
    tile_major = kvarn.Records.empty(f, 20, KV_HEADS, order="tile", round_to=512)
    tile_major.data[:, :, : f.record_bytes] = segments[1].data
    assert np.array_equal(kvarn.attend(q, [segments[0], tile_major, segments[2]]), expected)
    half = np.zeros((6, M, DIM), np.float16)
    kvarn.attend(q, segments, out=half)
    assert np.array_equal(half, expected.astype(np.float16))
    rounded = (q.view(np.uint32) >> 16).astype(np.uint16)
    assert np.array_equal(kvarn.attend(rounded, segments), kvarn.attend(as_float(rounded), segments))


def test_parts_of_tiles_and_positions(history):
    f, segments, k, v, q = history
    records = segments[1]
    got = kvarn.attend(q, [kvarn.SealedTokens(records, 100, 1000)], precision="exact", log_sum_exp=True)
    close(got, reference(q, k[:, 110:1010], v[:, 110:1010]))
    gap = kvarn.attend(
        q,
        [kvarn.SealedTokens(records, 0, 64), kvarn.ExactTokens(k[:, -37:], v[:, -37:], position=10_000)],
        precision="exact",
        window=1000,
        log_sum_exp=True,
    )
    close(gap, reference(q, k[:, -37:], v[:, -37:]))
    one = kvarn.attend(q[:3], records.head(0))
    assert np.array_equal(one, kvarn.attend(q, [records])[:3])


def test_exact_tokens_alone(history):
    f, segments, k, v, q = history
    close(kvarn.attend(q, (k, v), format=f, log_sum_exp=True), reference(q, k, v))
    half_k, half_v = k.astype(np.float16), v.astype(np.float16)
    close(
        kvarn.attend(q, (half_k, half_v), format=f, log_sum_exp=True),
        reference(q, half_k.astype(np.float32), half_v.astype(np.float32)),
    )


def test_rotated_queries_and_outputs(history):
    f, segments, k, v, q = history
    expected = kvarn.attend(q, segments, precision="exact")
    turned = kvarn.attend(
        kvarn.rotate(q.copy()), segments, query_basis="rotated", output_basis="rotated", precision="exact"
    )
    assert np.abs(kvarn.rotate(turned, inverse=True) - expected).max() < 1e-4


def test_formats_of_heads(history, values):
    _, _, _, _, q = history
    base = kvarn.Format("k4v4_g64", DIM)
    formats = [base, base.replace(key_rotated=False, value_rotated=False)]
    records = kvarn.quantize(formats, values(2, 128, DIM), values(2, 128, DIM, 2))
    both = kvarn.attend(q, records)
    for head in range(2):
        assert np.array_equal(
            both[3 * head : 3 * head + 3], kvarn.attend(q[3 * head : 3 * head + 3], records.head(head))
        )


def test_errors_name_the_argument(history):
    f, segments, k, v, q = history
    bad = q.copy()
    bad[2, 1, 7] = np.inf
    with pytest.raises(kvarn.KvarnError, match="q: .*NOT_FINITE") as error:
        kvarn.attend(bad, segments, threads=2)
    assert error.value.argument == "q"
    for call, words in (
        (lambda: kvarn.attend(q[:5], segments), "q: 5 query heads"),
        (lambda: kvarn.attend(q, []), "format: is needed"),
        (lambda: kvarn.attend(q[..., :32], segments), "q: 32 channels"),
        (lambda: kvarn.attend(q, [segments[1], (k[:1], v[:1])]), r"history\[1\]: 1 KV heads"),
        (lambda: kvarn.attend(q, [segments[1], (k,)]), r"history\[1\].v: is missing"),
        (lambda: kvarn.attend(q, segments, sink_logits=[1.0]), "sink_logits"),
        (lambda: kvarn.attend(q, segments, mask=np.ones((1, 1), bool)), "mask"),
        (lambda: kvarn.attend(q, segments, precision="best"), "precision"),
        (lambda: kvarn.attend(q, segments, out=np.zeros((1, 1, 1), np.float32)), "out"),
        (lambda: kvarn.attend(q, segments, query_basis="x"), "query_basis"),
        (lambda: kvarn.attend(q, [segments[1]], format=kvarn.Format()), "format: .*not that of the records"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match=r"history\[0\]"):
        kvarn.attend(q, ["records"])
    with pytest.raises(kvarn.KvarnError, match="BAD_ARGUMENT"):
        kvarn.attend(q, segments, window=-1)
