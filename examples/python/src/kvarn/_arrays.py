# SPDX-License-Identifier: Apache-2.0
"""Arrays of others as views of the library, without copies.

Values are [heads, tokens, channels] with any strides, in memory of this machine: float32, float16, or
bfloat16 as torch.bfloat16, ml_dtypes.bfloat16, or its bits in uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._c import View

F32, F16, BF16 = 0, 1, 2
_BYTES = {F32: 4, F16: 2, BF16: 2}

ArrayLike = Any  #: a NumPy array, a torch tensor on the CPU, or anything else with DLPack


def _dlpack(array: Any, name: str) -> npt.NDArray[Any]:
    try:
        return np.from_dlpack(array)
    except Exception as error:  # of whatever library the array is from
        raise TypeError(
            f"{name}: NumPy cannot look at this "
            f"{type(array).__module__}.{type(array).__qualname__} without a copy: "
            f"{error} (tensors must be on the CPU and need no gradient: .cpu(), .detach())"
        ) from error


def as_numpy(array: ArrayLike, name: str) -> tuple[npt.NDArray[Any], int]:
    """The same memory as a NumPy array, and its element type. bfloat16 comes as uint16."""
    if not isinstance(array, np.ndarray):
        if str(getattr(array, "dtype", "")) == "torch.bfloat16":
            import torch  # type: ignore[import-not-found, unused-ignore]

            array = _dlpack(array.view(torch.int16), name).view(np.uint16)
        elif hasattr(array, "__dlpack__"):
            array = _dlpack(array, name)
        else:
            raise TypeError(
                f"{name}: expected a NumPy array, a torch tensor or another array with DLPack, not "
                f"{type(array).__name__}"
            )
    if array.dtype == np.float32:
        return array, F32
    if array.dtype == np.float16:
        return array, F16
    if array.dtype == np.uint16:
        return array, BF16
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16), BF16
    raise TypeError(
        f"{name}: float32, float16 or bfloat16 (torch.bfloat16, ml_dtypes.bfloat16, or its bits as "
        f"uint16), not "
        f"{array.dtype}; nothing is converted silently"
    )


class Values:
    """Values [heads, tokens, channels] of somebody else, and a view of them. Keeps their memory alive."""

    def __init__(self, array: ArrayLike, name: str, *, writable: bool = False):
        owner = array
        self.array, self.type = as_numpy(array, name)
        self.name = name
        self.owner = owner
        if self.array.ndim != 3:
            raise ValueError(
                f"{name}: expected [heads, tokens, channels], got the shape {self.array.shape}"
                + (
                    "; take one batch entry, or another order with transpose, which copies nothing"
                    if self.array.ndim == 4
                    else ""
                )
            )
        if not self.array.dtype.isnative:
            raise TypeError(f"{name}: the byte order is not this machine's")
        size = self.array.itemsize
        if any(stride % size for stride in self.array.strides):
            raise ValueError(f"{name}: strides {self.array.strides} are not whole elements of {size} bytes")
        # NumPy may call read-only what it sees through DLPack; tensors of PyTorch are not.
        if (
            writable
            and not self.array.flags.writeable
            and type(owner).__module__.partition(".")[0] != "torch"
        ):
            raise ValueError(f"{name}: the array is read-only")
        self.heads, self.tokens, self.channels = self.array.shape

    def view(self, head: int = 0, heads: int | None = None) -> View:
        """Of all heads, or of `heads` of them from `head` on."""
        strides = [stride // self.array.itemsize for stride in self.array.strides]
        return View(
            data=self.array.ctypes.data + head * self.array.strides[0],
            tokens=self.tokens,
            heads=self.heads if heads is None else heads,
            channels=self.channels,
            token_stride=strides[1],
            head_stride=strides[0],
            channel_stride=strides[2],
            type=self.type,
        )

    def not_finite(self) -> bool:
        return not bool(np.isfinite(as_float(self.array)).all())


def as_float(array: ArrayLike) -> npt.NDArray[np.float32]:
    """Values as float32; bits of bfloat16 (uint16) become their values. Copies where it must."""
    found, kind = as_numpy(array, "array")
    if kind == BF16:
        return (found.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(found, np.float32)


def element_type(dtype: Any, name: str = "dtype") -> tuple[int, np.dtype[Any]]:
    """The library's number of an element type and the NumPy type to allocate. "bfloat16" is allocated as
    uint16.
    """
    if isinstance(dtype, str) and dtype == "bfloat16" or str(dtype) == "torch.bfloat16":
        return BF16, np.dtype(np.uint16)
    text = str(dtype)
    found = np.dtype(text.removeprefix("torch.") if text.startswith("torch.") else dtype)
    if found == np.float32:
        return F32, found
    if found == np.float16:
        return F16, found
    if found == np.uint16 or found.name == "bfloat16":
        return BF16, found
    raise TypeError(f"{name}: float32, float16 or bfloat16, not {dtype}")


def new_values(heads: int, tokens: int, channels: int, dtype: Any) -> npt.NDArray[Any]:
    return np.empty((heads, tokens, channels), element_type(dtype)[1])


def float_row(array: ArrayLike | None, count: int, name: str) -> npt.NDArray[np.float32] | None:
    """A few numbers of one row, as contiguous float32."""
    if array is None:
        return None
    row = np.ascontiguousarray(np.asarray(array, np.float32))
    if row.shape != (count,):
        raise ValueError(f"{name}: expected [{count}], one for each query head, got the shape {row.shape}")
    return row


def address(array: npt.NDArray[Any] | None, offset: int = 0) -> int | None:
    return None if array is None else array.ctypes.data + offset
