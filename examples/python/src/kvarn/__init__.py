# SPDX-License-Identifier: Apache-2.0
"""KV caches in records of 2 to 8 bits an element, attention straight on them, and the life of a whole cache.

    import kvarn, numpy as np
    k4v2 = kvarn.Format("k4v2_g128", head_dim=128)
    records = kvarn.quantize(k4v2, k, v)                     # k, v: [KV heads, tokens, channels], any strides
    out = kvarn.attend(q, [records, (tail_k, tail_v)])       # q: [query heads, new tokens, channels]
    print(kvarn.compare(k, v, ["k4v2_g128", "k2v2_g128"], q))

Arrays are NumPy arrays, torch tensors on the CPU or anything with DLPack, in float32, float16 or bfloat16,
and are not copied. Errors of the library are KvarnError, errors that can be seen before are ValueError and
TypeError; both name the argument. Calls release the GIL.
"""

from __future__ import annotations

from ._c import KvarnError, Status
from ._c import lib as _lib
from ._c import path as library_path
from .attention import AttentionOptions, ExactTokens, SealedTokens, attend
from .cache import (
    Cache,
    CacheConfig,
    CachePlan,
    KeptTile,
    PoolStatistics,
    Rule,
    SealReport,
    Sequence,
    SequencePlan,
    SequenceStatistics,
    ShiftReport,
    Step,
)
from .codec import ERRORS, Encoding, Records, choose_format, dequantize, quantize, rotate
from .compare import Comparison, Method, compare
from .formats import Format, Support, supports

__version__: str = _lib.kvarn_version().decode()


def active_arch() -> str:
    """The instruction set in use, for example avx2. All give the same bits."""
    return str(_lib.kvarn_active_arch().decode())


def usable_archs() -> list[str]:
    """The sets that the library has and this machine runs, the slowest first."""
    names: list[str] = []
    while (name := _lib.kvarn_usable_arch(len(names))) is not None:
        names.append(name.decode())
    return names


def select_arch(name: str) -> None:
    """Makes one of them the set in use, for the whole process."""
    status = _lib.kvarn_select_arch(name.encode())
    if status:
        raise KvarnError(status, "select_arch", "name", f"one of {', '.join(usable_archs())}")


def has_files() -> bool:
    """Whether the library can save and load."""
    return bool(_lib.kvarn_has_files())


__all__ = [
    "AttentionOptions",
    "Cache",
    "CacheConfig",
    "CachePlan",
    "Comparison",
    "ERRORS",
    "Encoding",
    "ExactTokens",
    "Format",
    "KeptTile",
    "KvarnError",
    "Method",
    "PoolStatistics",
    "Records",
    "Rule",
    "SealReport",
    "SealedTokens",
    "Sequence",
    "SequencePlan",
    "SequenceStatistics",
    "ShiftReport",
    "Status",
    "Support",
    "Step",
    "active_arch",
    "attend",
    "choose_format",
    "compare",
    "dequantize",
    "has_files",
    "library_path",
    "quantize",
    "rotate",
    "select_arch",
    "supports",
    "usable_archs",
]
