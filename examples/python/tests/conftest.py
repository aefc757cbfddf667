# SPDX-License-Identifier: Apache-2.0
"""Data for all tests. They run against an installed package, or with KVARN_LIBRARY and
PYTHONPATH=examples/python/src.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "manifest.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture
def golden():
    """K, V and the record of a case of tests/golden."""
    return lambda case: tuple(
        np.load(ROOT / "tests" / "golden" / f"{case}_{part}.npy") for part in ("k", "v", "record")
    )


@pytest.fixture
def activations():
    """K, V and queries of layer 0 of examples/data: float16 [heads, tokens, head_dim]."""
    return tuple(np.load(ROOT / "examples" / "data" / f"layer0_{part}.npy") for part in "kvq")


@pytest.fixture
def values():
    """Random float32 [heads, tokens, channels] with outlier channels."""

    def make(heads: int, tokens: int, channels: int, seed: int = 1) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return (
            generator.standard_normal((heads, tokens, channels)) * np.exp(generator.standard_normal(channels))
        ).astype(np.float32)

    return make
