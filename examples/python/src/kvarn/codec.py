# SPDX-License-Identifier: Apache-2.0
"""K and V into records and back."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from . import _work
from ._arrays import ArrayLike, Values, address, element_type, new_values
from ._c import CChooseOptions, CEncodeOptions, CFormat, CRecords, Status, check, lib
from .formats import Format, basis_number

ENCODERS = {"paper": 0, "refined": 1}

#: What a record lost, for K and V: `worst_scale_error` is the largest | |x'| / |x| - 1 | and
#: `worst_relative_error` the largest |x - x'| / |x| over the tokens, `relative_error` is |X - X'| / |X| over
#: the part. No unit.
ERRORS = np.dtype(
    [
        (
            part,
            [(name, np.float32) for name in ("worst_scale_error", "worst_relative_error", "relative_error")],
        )
        for part in ("k", "v")
    ]
)

#: One format for all heads, or one for each (they differ in bases at most).
Formats = Union[Format, Sequence[Format]]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How to encode; a record is the same on every machine for the same options.

    encoder: "refined" (least squared error, token norms kept) or "paper" (min-max rounding). iterations:
    rounds of variance normalisation at most, 0..64; refined_iterations: of the refined encoder, for a
    balanced tile; refit_rounds: 0..16; clip_steps: clip ranges tried below the whole one, 0..8. key_basis,
    value_basis: "rotated" where the input is rotated already.
    """

    encoder: str = "refined"
    iterations: int = 8
    refined_iterations: int = 1
    refit_rounds: int = 5
    clip_steps: int = 2
    key_basis: str = "original"
    value_basis: str = "original"

    def _make(self) -> CEncodeOptions:
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder: 'refined' or 'paper', not {self.encoder!r}")
        return CEncodeOptions(
            encoder=ENCODERS[self.encoder],
            iterations=self.iterations,
            refined_iterations=self.refined_iterations,
            refit_rounds=self.refit_rounds,
            clip_steps=self.clip_steps,
            key_basis=basis_number(self.key_basis, "key_basis"),
            value_basis=basis_number(self.value_basis, "value_basis"),
        )


class Records:
    """A grid of records [tiles, heads] in a NumPy array of bytes.

    data: uint8 [tiles, heads, bytes], any strides but that the bytes of a record lie together. Made by
    `quantize`, or around bytes of yours, which are not copied.
    """

    def __init__(self, format: Formats, data: npt.NDArray[np.uint8], errors: npt.NDArray[Any] | None = None):
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 3:
            raise TypeError("data: expected a NumPy array of uint8 [tiles, heads, bytes of a record]")
        self.data = data
        self.formats = formats_of_heads(format, data.shape[1])
        need = self.format.layout["content_bytes"]
        if data.shape[2] < need or (data.strides[2] != 1 and data.size):
            raise ValueError(
                f"data: records of {self.format.name} are {need} consecutive bytes, got {data.shape[2]} at a "
                f"distance of {data.strides[2]}"
            )
        if any(stride < 0 for stride in data.strides):
            raise ValueError("data: strides of records must not be negative")
        #: [tiles, heads] of ERRORS, where they were asked for.
        self.errors = errors

    @classmethod
    def empty(
        cls, format: Formats, tiles: int, heads: int, *, order: str = "head", round_to: int = 0
    ) -> Records:
        """A dense grid. order: "head" (all tiles of head 0, then of head 1: as attention reads) or "tile".
        round_to: the distance of records is a multiple of so many bytes; 0 means 8.
        """
        size = int(
            lib.kvarn_record_bytes(
                formats_of_heads(format, heads)[0]._ref if heads else _one(format)._ref, round_to
            )
        )
        if size == 0:
            raise ValueError(f"round_to: {round_to} makes no sense")
        if order == "head":
            return cls(format, np.zeros((heads, tiles, size), np.uint8).transpose(1, 0, 2))
        if order == "tile":
            return cls(format, np.zeros((tiles, heads, size), np.uint8))
        raise ValueError(f"order: 'head' or 'tile', not {order!r}")

    @property
    def format(self) -> Format:
        """Of all heads, or of the first one where they differ in their bases."""
        return self.formats[0]

    @property
    def tiles(self) -> int:
        return int(self.data.shape[0])

    @property
    def heads(self) -> int:
        return int(self.data.shape[1])

    @property
    def tokens(self) -> int:
        return self.tiles * self.format.group

    @property
    def nbytes(self) -> int:
        """Bytes of all records, padding included."""
        return self.tiles * self.heads * int(self.data.shape[2])

    @property
    def strides(self) -> tuple[int, int]:
        """Bytes from a tile to the next, and from a head to the next."""
        return self.data.strides[0], self.data.strides[1]

    def __getitem__(self, tiles: slice) -> Records:
        """Some of the tiles; shares memory."""
        if not isinstance(tiles, slice):
            raise TypeError("records[first:last]: expected a slice of tiles")
        return Records(self.formats, self.data[tiles], None if self.errors is None else self.errors[tiles])

    def head(self, head: int) -> Records:
        """One head; shares memory."""
        head = range(self.heads)[head]
        return Records(
            self.formats[head],
            self.data[:, head : head + 1],
            None if self.errors is None else self.errors[:, head : head + 1],
        )

    def _grid(self) -> CRecords:
        tile, head = self.strides
        # An axis of length 1 may have any stride in NumPy.
        whole = (
            (self.tiles - 1) * tile + (self.heads - 1) * head + self.data.shape[2]
            if self.tiles and self.heads
            else 0
        )
        return CRecords(
            data=self.data.ctypes.data,
            bytes=whole,
            tiles=self.tiles,
            heads=self.heads,
            tile_stride=tile,
            head_stride=head,
            record_bytes=self.data.shape[2],
        )

    def _runs(self) -> list[tuple[int, int, Format]]:
        """Heads of the same format in a row: first, count, format."""
        runs: list[tuple[int, int, Format]] = []
        for head, format in enumerate(self.formats):
            if runs and runs[-1][2] == format:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, format)
            else:
                runs.append((head, 1, format))
        return runs

    def _part(self, first: int, count: int) -> CRecords:
        return Records(self.formats[first : first + count], self.data[:, first : first + count])._grid()

    def __repr__(self) -> str:
        names = sorted({format.name for format in self.formats})
        return f"Records({' or '.join(names)}, tiles={self.tiles}, heads={self.heads}, nbytes={self.nbytes})"


def _one(format: Formats) -> Format:
    return format if isinstance(format, Format) else format[0]


def formats_of_heads(format: Formats, heads: int, name: str = "format") -> tuple[Format, ...]:
    if isinstance(format, Format):
        return (format,) * max(heads, 1)
    formats = tuple(format)
    if not formats or not all(isinstance(f, Format) for f in formats):
        raise TypeError(f"{name}: expected a Format, or one for each head")
    if len(formats) != max(heads, 1):
        raise ValueError(f"{name}: {len(formats)} formats for {heads} heads")
    if len({(f.bits, f.group, f.head_dim_k, f.head_dim_v, f.exact_channels) for f in formats}) != 1:
        raise ValueError(f"{name}: the formats of the heads may differ in their bases only")
    return formats


def _blame(status: int, where: str, *values: Values | None, detail: str | None = None) -> None:
    """check(), which finds the argument whose values are not finite."""
    argument = None
    if status == Status.NOT_FINITE:
        argument = next((v.name for v in values if v is not None and v.not_finite()), None)
    elif status == Status.SCALE_OVERFLOW:
        argument = " or ".join(v.name for v in values if v is not None)
    check(status, where, argument, detail)


def _pair(
    format: Format,
    k: ArrayLike | None,
    v: ArrayLike | None,
    *,
    tiles: bool,
    writable: bool = False,
    names: tuple[str, str] = ("k", "v"),
) -> tuple[Values | None, Values | None]:
    """K and V as views, with shapes that fit the format and each other."""
    found_k = None if k is None else Values(k, names[0], writable=writable)
    found_v = None if v is None else Values(v, names[1], writable=writable)
    if found_v is not None and not format.has_values:
        raise ValueError(f"{names[1]}: {format.name} has no V part")
    for found, channels in ((found_k, format.key_channels), (found_v, format.head_dim_v)):
        if found is not None and found.channels != channels:
            raise ValueError(f"{found.name}: {found.channels} channels, {format} has {channels}")
        if found is not None and tiles and found.tokens % format.group:
            whole = found.tokens // format.group * format.group
            raise ValueError(
                f"{found.name}: {found.tokens} tokens are no whole tiles of {format.group}: "
                f"array[:, :{whole}] is, "
                f"the other {found.tokens - whole} stay exact"
            )
    if found_k is not None and found_v is not None:
        if (found_k.heads, found_k.tokens) != (found_v.heads, found_v.tokens):
            raise ValueError(
                f"{names[1]}: {found_v.heads} heads of {found_v.tokens} tokens, but {names[0]} has "
                f"{found_k.heads} "
                f"of {found_k.tokens}"
            )
        if found_k.type != found_v.type:
            raise TypeError(f"{names[1]}: {names[0]} and {names[1]} must have one element type")
    return found_k, found_v


def _encoding(encoder: str | Encoding) -> CEncodeOptions:
    return (encoder if isinstance(encoder, Encoding) else Encoding(encoder))._make()


def quantize(
    format: Formats,
    k: ArrayLike,
    v: ArrayLike | None = None,
    *,
    encoder: str | Encoding = "refined",
    errors: bool = False,
    out: Records | None = None,
    order: str = "head",
    round_to: int = 0,
    threads: _work.Threads = 1,
) -> Records:
    """Quantizes K [heads, tokens, head_dim + exact channels] and V [heads, tokens, head_dim_v] into records.

    tokens must be whole tiles of `format.group`. Arrays are float32, float16 or bfloat16 with any strides and
    are not copied; [tokens, heads, channels] is array.transpose(1, 0, 2). format may be one for each head, as
    `choose_format` finds them. encoder: "refined", "paper" or an Encoding. errors: also say what each record
    lost (Records.errors). out: where to write; order and round_to as for Records.empty. Same bytes for any
    number of threads.
    """
    first = _one(format)
    values_k, values_v = _pair(first, k, v, tiles=True)
    assert values_k is not None
    if values_v is None and first.has_values:
        raise ValueError(f"v: is missing, {first.name} has a V part")
    tiles, heads = values_k.tokens // first.group, values_k.heads
    formats = formats_of_heads(format, heads)
    if out is None:
        out = Records.empty(formats, tiles, heads, order=order, round_to=round_to)
    elif (out.tiles, out.heads, out.formats) != (tiles, heads, formats):
        raise ValueError(f"out: {out} is not of {tiles} tiles, {heads} heads and these formats")
    elif not out.data.flags.writeable:
        raise ValueError("out: the array is read-only")
    options = _encoding(encoder)
    lost = np.zeros((tiles, heads), ERRORS) if errors else None
    for begin, count, one in out._runs():
        grid, view_k = out._part(begin, count), values_k.view(begin, count)
        view_v = None if values_v is None else values_v.view(begin, count)
        scratch_bytes, items = int(lib.kvarn_scratch_bytes(one._ref)), tiles * count
        each = np.zeros(items, ERRORS) if errors else None

        def seal(item: int, scratch: npt.NDArray[np.uint8]) -> None:
            status = lib.kvarn_quantize_items(
                one._ref,
                ctypes.byref(view_k),
                None if view_v is None else ctypes.byref(view_v),
                ctypes.byref(grid),
                ctypes.byref(options),
                item,
                item + 1,
                address(scratch),
                scratch.size,
                None if each is None else each.ctypes.data + item * ERRORS.itemsize,
                0 if each is None else 1,
            )
            _blame(
                status,
                "quantize",
                values_k,
                values_v,
                detail=f"tile {item // count}, head {begin + item % count}" if status else None,
            )

        _work.run(items, scratch_bytes, threads, seal)
        if lost is not None and each is not None:
            lost[:, begin : begin + count] = each.reshape(tiles, count)
    out.errors = lost
    return out


def dequantize(
    records: Records,
    *,
    basis: str = "original",
    dtype: Any = np.float32,
    out: tuple[ArrayLike | None, ArrayLike | None] | None = None,
    threads: _work.Threads = 1,
) -> tuple[Any, Any]:
    """Decodes records: K [heads, tokens, head_dim + exact channels] and V [heads, tokens, head_dim_v] (None
    without a V part).

    basis: "original", or "rotated": as they are stored. dtype: float32, float16, or "bfloat16" (its bits, as
    uint16). out: (k, v) to write to instead, NumPy arrays or tensors of one type; either may be None and is
    then left out.
    """
    first = records.format
    wanted = basis_number(basis, "basis")
    if out is None:
        element_type(dtype)
        k: Any = new_values(records.heads, records.tokens, first.key_channels, dtype)
        v: Any = (
            new_values(records.heads, records.tokens, first.head_dim_v, dtype) if first.has_values else None
        )
    else:
        k, v = out
    values_k, values_v = _pair(
        first, k, v, tiles=True, writable=True, names=("k", "v") if out is None else ("out[0]", "out[1]")
    )
    for values in (values_k, values_v):
        if values is not None and (values.heads, values.tokens) != (records.heads, records.tokens):
            raise ValueError(
                f"{values.name}: {values.heads} heads of {values.tokens} tokens, the records "
                f"have {records.heads} "
                f"of {records.tokens}"
            )
    for begin, count, one in records._runs():
        grid = records._part(begin, count)
        view_k = None if values_k is None else values_k.view(begin, count)
        view_v = None if values_v is None else values_v.view(begin, count)

        def decode(item: int, scratch: npt.NDArray[np.uint8]) -> None:
            check(
                lib.kvarn_dequantize_items(
                    one._ref,
                    ctypes.byref(grid),
                    None if view_k is None else ctypes.byref(view_k),
                    None if view_v is None else ctypes.byref(view_v),
                    wanted,
                    item,
                    item + 1,
                    address(scratch),
                    scratch.size,
                ),
                "dequantize",
                "records",
            )

        if records.heads:
            _work.run(records.tiles * count, int(lib.kvarn_scratch_bytes(one._ref)), threads, decode)
    return k, v


def rotate(x: ArrayLike, *, inverse: bool = False) -> ArrayLike:
    """Rotates vectors in place, x <- H x / sqrt(channels): [heads, tokens, channels]. Returns x."""
    values = Values(x, "x", writable=True)
    function = lib.kvarn_unrotate if inverse else lib.kvarn_rotate
    check(function(ctypes.byref(values.view())), "rotate", "x")
    return x


def choose_format(
    format: Format,
    k: ArrayLike,
    v: ArrayLike | None,
    q: ArrayLike,
    *,
    margin: float = 1.5,
    value_margin: float = 2.0,
    most_key_error: float = 0.0,
    most_value_error: float = 0.0,
    encoder: str | Encoding = "refined",
) -> list[Format]:
    """The format of each KV head: rotated or not, K and V apart, whichever loses less on these tokens and
    their queries.

    k, v: as for quantize, best the first tile (array[:, :format.group]); q: [query heads, tokens, channels],
    the queries of the same or other tokens, as they meet K (behind the rotary embedding); query heads of a
    group in a row. margin: a part leaves the rotation where that divides its error by more. most_key_error,
    most_value_error: above 0, take as many bits, up to 8, as keep the weighted error within that (heads that
    then differ in bits are quantized one by one). Give the result to `quantize`.
    """
    values_k, values_v = _pair(format, k, v, tiles=True)
    queries = Values(q, "q")
    assert values_k is not None
    if queries.heads % max(values_k.heads, 1) or queries.heads == 0:
        raise ValueError(f"q: {queries.heads} query heads are no multiple of {values_k.heads} KV heads")
    if queries.channels < format.head_dim_k:
        raise ValueError(f"q: {queries.channels} channels, at least {format.head_dim_k} are needed")
    encode = _encoding(encoder)
    options = CChooseOptions(
        margin=margin,
        value_margin=value_margin,
        most_key_error=most_key_error,
        most_value_error=most_value_error,
        encode=ctypes.pointer(encode),
    )
    scratch = np.empty(int(lib.kvarn_choose_scratch_bytes(format._ref)), np.uint8)
    rows = queries.heads // values_k.heads
    chosen = []
    for head in range(values_k.heads):
        moments = np.zeros(format.head_dim_k, np.uint64)
        _blame(
            lib.kvarn_add_query_moments(
                format._ref, ctypes.byref(queries.view(head * rows, rows)), address(moments), moments.size
            ),
            "choose_format",
            queries,
        )
        made = CFormat()
        status = lib.kvarn_choose_format(
            format._ref,
            ctypes.byref(values_k.view(head, 1)),
            None if values_v is None else ctypes.byref(values_v.view(head, 1)),
            address(moments),
            moments.size,
            ctypes.byref(options),
            address(scratch),
            scratch.size,
            ctypes.byref(made),
        )
        _blame(status, "choose_format", values_k, values_v)
        chosen.append(Format._of_c(made))
    return chosen


def scratch_bytes(format: Format, query_rows: int = 0) -> int:
    """What the library needs for one call on a format and up to so many query rows."""
    return int(lib.kvarn_call_scratch_bytes(format._ref, query_rows))
