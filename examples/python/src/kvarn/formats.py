# SPDX-License-Identifier: Apache-2.0
"""Formats: what a record holds, its size, and which code it runs on."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from . import _c
from ._c import CFormat, CLayout, CSupport, check, lib

#: Which parameter of a Format each status is about.
_ARGUMENTS = {1: "name", 2: "head_dim", 3: "bits", 4: "group", 5: "exact_channels"}

BASES = {"original": 0, "rotated": 1}


def basis_number(basis: str, name: str) -> int:
    if basis not in BASES:
        raise ValueError(f"{name}: 'original' or 'rotated', not {basis!r}")
    return BASES[basis]


OPERATIONS = {"seal": 0, "dequantize": 1, "attend": 2}
PRECISIONS = {"exact": 0, "fine": 1, "fast": 2}


def precision_number(precision: str) -> int:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: 'exact', 'fine' or 'fast', not {precision!r}")
    return PRECISIONS[precision]


class Support(NamedTuple):
    """What an operation on a format runs on here; every format runs on every instruction set.

    arch: the set in use. fixed_bounds: whether head_dim and group are 64, 128 or 256, so that loops have
    compile-time bounds. key_precision, value_precision: of attention, of the products with codes of K and V:
    the next more precise one where the shape does not allow what was asked for. time: about how many times as
    long as on avx2 an element takes; 0: not measured there.
    """

    arch: str
    fixed_bounds: bool
    key_precision: str
    value_precision: str
    time: float


class Format:
    """What a record holds: one tile of `group` tokens of one KV head, K of 2 to 8 bits and V of 2 to 8 (or 0)
    bits.

    name: `k<bits>v<bits>_g<group>`, for example "k4v2_g128"; `_ko`, `_vo` or `_kovo` behind it where K, V or
    both are not rotated. head_dim: channels of a K vector that are quantized; head_dim_v: those of a V
    vector, if different; exact_channels: further channels of K that stay float16 (a decoupled rotary part).
    Formats are immutable values.
    """

    __slots__ = ("_c",)
    _c: CFormat

    def __init__(
        self,
        name: str = "k4v2_g128",
        head_dim: int = 128,
        *,
        head_dim_v: int | None = None,
        exact_channels: int = 0,
    ):
        made = CFormat(
            head_dim_k=head_dim,
            head_dim_v=head_dim if head_dim_v is None else head_dim_v,
            exact_channels=exact_channels,
        )
        parsed = CFormat()
        status = lib.kvarn_format_parse(
            str(name).encode(), made.head_dim_k, made.head_dim_v, ctypes.byref(parsed)
        )
        if status == 0 and exact_channels:
            parsed.exact_channels = made.exact_channels
            status = lib.kvarn_format_make(ctypes.byref(parsed))
        check(status, f"Format({name!r}, head_dim={head_dim})", _ARGUMENTS.get(status))
        self._c = parsed

    @classmethod
    def of(
        cls,
        *,
        key_bits: int = 4,
        value_bits: int = 2,
        group: int = 128,
        head_dim: int = 128,
        head_dim_v: int | None = None,
        key_rotated: bool = True,
        value_rotated: bool = True,
        exact_channels: int = 0,
    ) -> Format:
        """A format by its parts. value_bits 0: no V part, attention reads V from K (latent attention)."""
        return cls._make(
            CFormat(
                head_dim_k=head_dim,
                head_dim_v=head_dim if head_dim_v is None else head_dim_v,
                key_bits=key_bits,
                value_bits=value_bits,
                group=group,
                key_rotation=int(key_rotated),
                value_rotation=int(value_rotated),
                exact_channels=exact_channels,
            )
        )

    @classmethod
    def _make(cls, c: CFormat) -> Format:
        status = lib.kvarn_format_make(ctypes.byref(c))
        check(status, "Format.of", _ARGUMENTS.get(status))
        return cls._of_c(c)

    @classmethod
    def _of_c(cls, c: CFormat) -> Format:
        made = cls.__new__(cls)
        made._c = c
        return made

    def replace(self, **parts: Any) -> Format:
        """The same format but for the given parts, named as for `of`."""
        mine = dict(
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            group=self.group,
            head_dim=self.head_dim_k,
            head_dim_v=self.head_dim_v,
            key_rotated=self.key_rotated,
            value_rotated=self.value_rotated,
            exact_channels=self.exact_channels,
        )
        return Format.of(**{**mine, **parts})

    def within(self, bits: float) -> Format:
        """This format with the widths that keep most at no more than `bits` bits an element, scales
        included.
        """
        made = CFormat()
        check(lib.kvarn_format_within(self._ref, bits, ctypes.byref(made)), "Format.within", "bits")
        return Format._of_c(made)

    @property
    def _ref(self) -> Any:
        return ctypes.byref(self._c)

    @property
    def name(self) -> str:
        """Its name, which Format() reads again."""
        original = ("" if self.key_rotated else "ko") + (
            "" if self.value_rotated or not self.has_values else "vo"
        )
        return f"k{self.key_bits}v{self.value_bits}_g{self.group}" + (f"_{original}" if original else "")

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of a code of K and of V."""
        return self.key_bits, self.value_bits

    @property
    def key_bits(self) -> int:
        return int(self._c.key_bits)

    @property
    def value_bits(self) -> int:
        return int(self._c.value_bits)

    @property
    def has_values(self) -> bool:
        """Whether records have a V part."""
        return self.value_bits != 0

    @property
    def group(self) -> int:
        """Tokens of a tile."""
        return int(self._c.group)

    @property
    def head_dim_k(self) -> int:
        """Quantized channels of a K vector."""
        return int(self._c.head_dim_k)

    @property
    def head_dim_v(self) -> int:
        """Channels of a V vector, and of an output of attention."""
        return int(self._c.head_dim_v) if self.has_values else self.head_dim_k

    @property
    def exact_channels(self) -> int:
        """Further channels of K, in float16."""
        return int(self._c.exact_channels)

    @property
    def key_channels(self) -> int:
        """All channels of a K vector and of a query."""
        return self.head_dim_k + self.exact_channels

    @property
    def key_rotated(self) -> bool:
        return bool(self._c.key_rotation)

    @property
    def value_rotated(self) -> bool:
        return bool(self._c.value_rotation)

    @property
    def record_bytes(self) -> int:
        """Bytes from one record to the next: its content, rounded up to a multiple of 8."""
        return int(lib.kvarn_record_bytes(self._ref, 0))

    @property
    def bits_per_element(self) -> float:
        """Bits per element of K and V, scales and padding included."""
        return float(lib.kvarn_bits_per_element(self._ref, 0))

    @property
    def layout(self) -> dict[str, int]:
        """Byte offsets of the fields of a record, and `content_bytes` (docs/record-format.md)."""
        made = CLayout()
        check(lib.kvarn_layout_of(self._ref, ctypes.byref(made)), "Format.layout")
        return {name: int(getattr(made, name)) for name, _ in CLayout._fields_[1:]}  # type: ignore[misc]

    def support(self, operation: str = "attend", precision: str = "fine") -> Support:
        """What an operation ("seal", "dequantize" or "attend") runs on here, and how fast about."""
        if operation not in OPERATIONS:
            raise ValueError(f"operation: 'seal', 'dequantize' or 'attend', not {operation!r}")
        made = CSupport()
        status = lib.kvarn_supports(
            self._ref, OPERATIONS[operation], precision_number(precision), ctypes.byref(made)
        )
        check(status, "Format.support")
        names = list(PRECISIONS)
        return Support(
            made.arch.decode(),
            bool(made.fixed_bounds),
            names[made.key_precision],
            names[made.value_precision],
            float(made.time),
        )

    def _key(self) -> tuple[int, ...]:
        return tuple(int(getattr(self._c, name)) for name, _ in CFormat._fields_[1:])  # type: ignore[misc]

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Format) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        more = f", head_dim_v={self.head_dim_v}" if self.head_dim_v != self.head_dim_k else ""
        more += f", exact_channels={self.exact_channels}" if self.exact_channels else ""
        return f"Format({self.name!r}, head_dim={self.head_dim_k}{more})"

    def __reduce__(self) -> Any:
        return (_unpickled, self._key())


def _unpickled(*parts: int) -> Format:
    names = [name for name, _ in CFormat._fields_[1:]]  # type: ignore[misc]
    return Format._make(CFormat(**dict(zip(names, parts))))


def supports(
    name: str,
    head_dim: int,
    *,
    head_dim_v: int | None = None,
    exact_channels: int = 0,
    operation: str = "attend",
) -> Support | None:
    """What an operation on a format would run on here; None where the library has no such format."""
    try:
        format = Format(name, head_dim, head_dim_v=head_dim_v, exact_channels=exact_channels)
    except _c.KvarnError:
        return None
    return format.support(operation)
