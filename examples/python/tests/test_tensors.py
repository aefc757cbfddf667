# SPDX-License-Identifier: Apache-2.0
"""Tensors of PyTorch, and whatever else has DLPack."""

from __future__ import annotations

import numpy as np
import pytest

import kvarn
from kvarn._arrays import Values


def test_anything_with_dlpack(values):
    class Foreign:
        """Only what DLPack asks for."""

        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **arguments):
            return self.array.__dlpack__(**arguments)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    k = values(2, 64, 64)
    assert Values(Foreign(k[:, :, ::2]), "k").view().data == k.ctypes.data
    f = kvarn.Format("k4v2_g64", 64)
    assert np.array_equal(kvarn.quantize(f, Foreign(k), Foreign(k)).data, kvarn.quantize(f, k, k).data)
    with pytest.raises(TypeError, match="k: .*without a copy"):
        kvarn.quantize(f, Foreign(None), k)


def test_tensors(values):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    f = kvarn.Format("k4v2_g64", 64)
    k, v = (torch.from_numpy(values(2, 128, 64, seed)) for seed in (1, 2))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        # As past_key_values has them: a batch entry, of a tensor that may be a transposed projection.
        batch_k = k.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)[None]
        assert Values(batch_k[0], "k").view().data == batch_k.data_ptr() and not batch_k[0].is_contiguous()
        records = kvarn.quantize(f, batch_k[0], v.to(dtype))
        widened = [x.to(dtype).float().numpy() for x in (k, v)]
        assert np.array_equal(records.data, kvarn.quantize(f, *widened).data)
        out = torch.zeros(2, 128, 64, dtype=dtype), torch.zeros(128, 2, 64, dtype=dtype).transpose(0, 1)
        assert kvarn.dequantize(records, out=out)[0] is out[0]
        expected = kvarn.dequantize(records)
        for mine, other in zip(out, expected):
            assert torch.equal(mine, torch.from_numpy(other).to(dtype))
        assert torch.equal(
            torch.as_tensor(kvarn.dequantize(records, dtype=torch.float16)[0]),
            torch.from_numpy(expected[0]).half(),
        )
        q = torch.randn(4, 3, 64).to(dtype)
        answer = torch.zeros(4, 3, 64)
        assert (
            kvarn.attend(q, [records, (batch_k[0, :, :5], v.to(dtype)[:, :5])], out=answer, precision="exact")
            is answer
        )
        everything = [
            torch.cat([torch.from_numpy(x), y[:, :5].to(dtype).float()], 1).repeat_interleave(2, 0)
            for x, y in zip(expected, (k, v))
        ]
        s = q.float() @ everything[0].transpose(1, 2) / 8
        s = s.masked_fill(torch.arange(133) > torch.arange(130, 133)[:, None], -torch.inf)
        assert (torch.softmax(s, -1) @ everything[1] - answer).abs().max() < 1e-3
    with pytest.raises(TypeError, match="k: .*detach"):
        kvarn.quantize(f, k.clone().requires_grad_(), v)
    with pytest.raises(TypeError, match="k: .*float64"):
        kvarn.quantize(f, k.double(), v)


def test_tensors_in_a_cache(values):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    f = kvarn.Format("k4v2_g64", 64)
    with (
        kvarn.Cache(f, layers=1, heads=2, most_step=128, exact="bfloat16") as cache,
        cache.open() as sequence,
    ):
        k = torch.from_numpy(values(2, 128, 64)).bfloat16()
        sequence.reserve(128)
        out = torch.zeros(4, 128, 64, dtype=torch.bfloat16)
        assert sequence.attend(0, torch.cat([k, k]), k, k, out=out) is out and out.abs().max() > 0
        sequence.commit()
        held = sequence.read(0, dtype="bfloat16")[0]
        assert np.array_equal(held.view(np.int16), k.view(torch.int16).numpy())
