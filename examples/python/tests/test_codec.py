# SPDX-License-Identifier: Apache-2.0
"""Records: against the golden data, strides, types, no copies, errors."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess

import numpy as np
import pytest
from conftest import GOLDEN, ROOT

import kvarn
from kvarn._arrays import Values, as_float


@pytest.mark.parametrize("case", GOLDEN, ids=[case["case"] for case in GOLDEN])
def test_golden_records(case, golden):
    """The paper's encoder writes the codes of the authors' code, and scalars that decode to the same values,
    but for rounding.
    """
    k, v, record = golden(case["case"])
    f = kvarn.Format.of(
        key_bits=case["key_bits"],
        value_bits=case["value_bits"],
        group=case["group"],
        head_dim=case["head_dim"],
    )
    at = f.layout
    assert at["content_bytes"] == case["record_bytes"]
    mine = kvarn.quantize(f, k[None], v[None], encoder=kvarn.Encoding("paper", iterations=case["iterations"]))
    for codes, scalars in (("k_codes", "k_channel_scale"), ("v_codes", "v_channel_scale")):
        assert np.array_equal(mine.data[0, 0, at[codes] : at[scalars]], record[at[codes] : at[scalars]])
    theirs = kvarn.Records(f, record.reshape(1, 1, -1))
    assert theirs.data.ctypes.data == record.ctypes.data
    for ours, other, exact in zip(kvarn.dequantize(mine), kvarn.dequantize(theirs), (k, v)):
        lost = np.linalg.norm(other[0] - exact.astype(np.float32))
        assert (
            0 < lost < 0.6 * np.linalg.norm(exact.astype(np.float32))
            and np.linalg.norm(ours - other) < 0.01 * lost
        )


def test_records_of_the_command(activations, tmp_path):
    """`kvarn quantize` writes the same records."""
    command = os.environ.get("KVARN_CLI")
    if not command:
        pytest.skip("KVARN_CLI does not name the command line tool")
    k, v, _ = activations
    data = ROOT / "examples" / "data"
    for name in ("k4v2_g128", "k3v5_g64"):
        subprocess.run(
            [
                command,
                "quantize",
                "--format",
                name,
                data / "layer0_k.npy",
                data / "layer0_v.npy",
                tmp_path / "file",
            ],
            check=True,
            capture_output=True,
        )
        records = kvarn.quantize(kvarn.Format(name, 128), k, v)
        assert records.data.transpose(1, 0, 2).tobytes() in (tmp_path / "file").read_bytes()


def test_errors_on_request(activations):
    k, v, _ = activations
    f = kvarn.Format()
    records = kvarn.quantize(f, k, v, errors=True)
    assert kvarn.quantize(f, k, v).errors is None and records.errors.shape == (4, 1)
    decoded = kvarn.dequantize(records)
    for part, x, y in zip("kv", (k, v), decoded):
        x = x.astype(np.float64)
        for tile in range(4):
            at = slice(tile * 128, tile * 128 + 128)
            lost = np.linalg.norm(x[0, at] - y[0, at]) / np.linalg.norm(x[0, at])
            assert lost == pytest.approx(records.errors[tile, 0][part]["relative_error"], rel=1e-4)
    paper = kvarn.quantize(f, k, v, encoder="paper", errors=True)
    assert (paper.errors["v"]["relative_error"] > records.errors["v"]["relative_error"]).all()


def test_strides_give_the_same_bytes(values):
    f = kvarn.Format("k3v2_g64", 64, head_dim_v=96)
    k, v = values(3, 192, 64), values(3, 192, 96, 2)
    expected = kvarn.quantize(f, k, v)
    token_major_k, token_major_v = (
        np.ascontiguousarray(k.transpose(1, 0, 2)),
        np.ascontiguousarray(v.transpose(1, 0, 2)),
    )
    wide = np.zeros((3, 192, 2 * 64), np.float32)
    wide[:, :, ::2] = k
    backwards = np.ascontiguousarray(v[::-1, ::-1])
    for other_k, other_v in (
        (token_major_k.transpose(1, 0, 2), token_major_v.transpose(1, 0, 2)),
        (wide[:, :, ::2], v),
        (k, backwards[::-1, ::-1]),
    ):
        got = kvarn.quantize(f, other_k, other_v, order="tile", round_to=4096, threads=2)
        assert got.strides == (3 * 4096 * (-(-f.record_bytes // 4096)), 4096 * (-(-f.record_bytes // 4096)))
        size = f.layout["content_bytes"]
        assert (
            np.array_equal(got.data[:, :, :size], expected.data[:, :, :size])
            and not got.data[:, :, size:].any()
        )
    out_k, out_v = np.zeros((192, 3, 64), np.float32), np.zeros((3, 192, 96, 2), np.float32)[..., 0]
    kvarn.dequantize(expected, out=(out_k.transpose(1, 0, 2), out_v))
    plain_k, plain_v = kvarn.dequantize(expected, threads=3)
    assert np.array_equal(out_k.transpose(1, 0, 2), plain_k) and np.array_equal(out_v, plain_v)
    only_v = np.empty_like(plain_v)
    kvarn.dequantize(expected, out=(None, only_v))
    assert np.array_equal(only_v, plain_v)


def test_nothing_is_copied(values):
    k = values(2, 128, 64)
    seen = Values(k.transpose(0, 1, 2)[:, ::-1], "k")
    assert seen.view().data == k[:, ::-1].ctypes.data and seen.view().token_stride == -64
    f = kvarn.Format("k4v4_g128", 64)
    memory = np.zeros(2 * f.record_bytes + 100, np.uint8)
    mine = kvarn.Records(f, memory[50 : 50 + 2 * f.record_bytes].reshape(1, 2, -1))
    got = kvarn.quantize(f, k, k, out=mine)
    assert (
        got is mine
        and memory[50:].any()
        and not memory[:50].any()
        and not memory[50 + 2 * f.record_bytes :].any()
    )
    assert np.shares_memory(got[0:1].data, memory) and np.shares_memory(got.head(-1).data, memory)
    assert got.head(1).data.ctypes.data == memory.ctypes.data + 50 + f.record_bytes
    out = np.empty((2, 128, 64), np.float16)
    returned = kvarn.dequantize(got, out=(out, None))[0]
    assert returned is out


def test_element_types(values):
    f = kvarn.Format("k4v2_g32", 64)
    exact = values(2, 64, 64)
    bits = (exact.view(np.uint32) >> 16).astype(np.uint16)
    widened = as_float(bits)
    assert np.array_equal(kvarn.quantize(f, bits, bits).data, kvarn.quantize(f, widened, widened).data)
    half = exact.astype(np.float16)
    records = kvarn.quantize(f, half, half)
    assert np.array_equal(
        records.data, kvarn.quantize(f, half.astype(np.float32), half.astype(np.float32)).data
    )
    in_float = kvarn.dequantize(records)[0]
    assert np.array_equal(kvarn.dequantize(records, dtype="float16")[0], in_float.astype(np.float16))
    in_bfloat = kvarn.dequantize(records, dtype="bfloat16")[0]
    assert (
        in_bfloat.dtype == np.uint16
        and np.abs(as_float(in_bfloat) - in_float).max() <= np.abs(in_float).max() / 256
    )


def test_ml_dtypes(values):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    f = kvarn.Format("k4v2_g32", 64)
    x = values(1, 32, 64).astype(ml_dtypes.bfloat16)
    records = kvarn.quantize(f, x, x)
    assert np.array_equal(records.data, kvarn.quantize(f, x.view(np.uint16), x.view(np.uint16)).data)
    assert kvarn.dequantize(records, dtype=ml_dtypes.bfloat16)[0].dtype == ml_dtypes.bfloat16


def test_bases(values):
    f = kvarn.Format("k8v8_g64", 64)
    k = values(2, 64, 64)
    records = kvarn.quantize(f, k, k)
    original, stored = kvarn.dequantize(records)[0], kvarn.dequantize(records, basis="rotated")[0]
    turned = kvarn.rotate(original.copy())
    assert np.abs(turned - stored).max() < 1e-4 * np.abs(stored).max()
    assert np.abs(kvarn.rotate(turned, inverse=True) - original).max() < 1e-4 * np.abs(original).max()
    turned = kvarn.rotate(k.copy())
    again = kvarn.quantize(
        f, turned, turned, encoder=kvarn.Encoding(key_basis="rotated", value_basis="rotated")
    )
    assert np.abs(kvarn.dequantize(again)[0] - original).max() < 0.02 * np.abs(original).max()


def test_formats_of_heads(activations, values):
    k, v, q = activations
    base = kvarn.Format("k2v2_g128")
    # One head as it is, and one with a large channel that no query looks at: a rotation would spread its
    # error over all others.
    spiky = np.random.default_rng(3).standard_normal((1, 128, 128)).astype(np.float32)
    spiky[:, :, 5] *= 50
    two_k = np.concatenate([k[:, :128].astype(np.float32), spiky])
    two_v = np.concatenate([v[:, :128].astype(np.float32)] * 2)
    two_q = np.concatenate([q[:, :128].astype(np.float32), values(2, 128, 128)])
    two_q[2:, :, 5] = 0
    formats = kvarn.choose_format(base, two_k, two_v, two_q)
    assert formats[0].key_rotated and not formats[1].key_rotated
    records = kvarn.quantize(formats, two_k, two_v, errors=True)
    for head, one in enumerate(formats):
        alone = kvarn.quantize(one, two_k[head : head + 1], two_v[head : head + 1])
        assert np.array_equal(alone.data[:, 0], records.data[:, head])
        assert np.array_equal(kvarn.dequantize(alone)[0][0], kvarn.dequantize(records)[0][head])
    seen = np.arange(128) != 5
    rotated = kvarn.dequantize(kvarn.quantize(base, two_k, two_v))[0]
    lost, lost_rotated = (
        np.linalg.norm((x[1] - two_k[1])[:, seen]) for x in (kvarn.dequantize(records)[0], rotated)
    )
    assert lost < 0.7 * lost_rotated
    more = kvarn.choose_format(base, two_k[:1], two_v[:1], two_q[:2], most_key_error=0.02)
    assert more[0].key_bits > 2


def test_latent(values):
    f = kvarn.Format.of(key_bits=4, value_bits=0, head_dim=128, exact_channels=32, group=64)
    k = values(1, 128, 160)
    records = kvarn.quantize(f, k)
    got, v = kvarn.dequantize(records)
    assert v is None and got.shape == k.shape
    assert np.array_equal(got[:, :, 128:], k[:, :, 128:].astype(np.float16).astype(np.float32))
    with pytest.raises(ValueError, match="v: .* no V part"):
        kvarn.quantize(f, k, k[:, :, :128])


def test_any_executor(values):
    f, k = kvarn.Format("k2v2_g32", 32), values(4, 320, 32)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert np.array_equal(kvarn.quantize(f, k, k, threads=pool).data, kvarn.quantize(f, k, k).data)
    with pytest.raises(ValueError, match="threads"):
        kvarn.quantize(f, k, k, threads=0)


def test_errors_name_the_argument(values):
    f, k, v = kvarn.Format("k4v2_g64", 64), values(2, 128, 64), values(2, 128, 64, 2)
    bad = v.copy()
    bad[1, 70, 3] = np.nan
    with pytest.raises(kvarn.KvarnError, match=r"v: .*tile 1, head 1.*NOT_FINITE") as error:
        kvarn.quantize(f, k, bad)
    assert error.value.argument == "v" and error.value.status is kvarn.Status.NOT_FINITE
    for wrong, words in (
        ((k[0], v), "k: expected .heads, tokens, channels., got the shape"),
        ((k[None], v), "k: .*batch"),
        ((k[:, :100], v[:, :100]), "k: 100 tokens are no whole tiles"),
        ((k, v[:, :64]), "v: 2 heads of 64"),
        ((k[:, :, :32], v), "k: 32 channels"),
        ((k, None), "v: is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            kvarn.quantize(f, *wrong)
    for wrong, words in (
        ((k.astype(np.float64), v), "k: .*float64"),
        ((k, v.astype(np.float16)), "v: .*one element type"),
        ((k.tolist(), v), "k: .*list"),
        ((k.astype(">f4"), v), "k: "),
    ):
        with pytest.raises(TypeError, match=words):
            kvarn.quantize(f, *wrong)
    odd = np.zeros(2 * 128 * 64, np.dtype([("a", np.float32), ("b", np.uint8)]))["a"].reshape(2, 128, 64)
    with pytest.raises(ValueError, match="v: strides"):
        kvarn.quantize(f, k, odd)
    with pytest.raises(ValueError, match="encoder"):
        kvarn.quantize(f, k, v, encoder="best")
    with pytest.raises(kvarn.KvarnError, match="BAD_ARGUMENT"):
        kvarn.quantize(f, k, v, encoder=kvarn.Encoding(clip_steps=99))
    records = kvarn.quantize(f, k, v)
    with pytest.raises(ValueError, match="basis"):
        kvarn.dequantize(records, basis="other")
    with pytest.raises(TypeError, match="dtype"):
        kvarn.dequantize(records, dtype=np.float64)
    frozen = np.empty((2, 128, 64), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"out\[0\]: .*read-only"):
        kvarn.dequantize(records, out=(frozen, None))
    with pytest.raises(ValueError, match=r"out\[1\]: 1 heads"):
        kvarn.dequantize(records, out=(None, np.empty((1, 128, 64), np.float32)))
    with pytest.raises(ValueError, match="data: records"):
        kvarn.Records(f, np.zeros((1, 1, 10), np.uint8))
    with pytest.raises(ValueError, match="out: "):
        kvarn.quantize(f, k, v, out=kvarn.Records.empty(f, 1, 2))
    with pytest.raises(ValueError, match="format: 3 formats for 2 heads"):
        kvarn.quantize([f] * 3, k, v)
    with pytest.raises(ValueError, match="format: .*bases only"):
        kvarn.quantize([f, f.replace(key_bits=2)], k, v)
