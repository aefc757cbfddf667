# SPDX-License-Identifier: Apache-2.0
"""The shared library: where it is, its structs, its functions, and statuses as exceptions.

The header include/kvarn/c/kvarn.h has the meaning of everything here; a test compares the structs with
tests/c/layout_64.txt.
"""

from __future__ import annotations

import ctypes
import enum
import os
import pathlib
import sys
from ctypes import (
    POINTER,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_ssize_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

import numpy as np

ABI = 1
SIZE_MAX: int = 2 ** (8 * ctypes.sizeof(c_size_t)) - 1


class Status(enum.IntEnum):
    """What a call of the library answered."""

    OK = 0
    BAD_FORMAT_NAME = 1
    UNSUPPORTED_HEAD_DIM = 2
    UNSUPPORTED_BITS = 3
    UNSUPPORTED_GROUP = 4
    UNSUPPORTED_CHANNELS = 5
    BAD_ARGUMENT = 6
    NULL_POINTER = 7
    SHAPE_MISMATCH = 8
    TOKEN_COUNT_MISMATCH = 9
    BUFFER_TOO_SMALL = 10
    NOT_FINITE = 11
    SCALE_OVERFLOW = 12
    OUT_OF_MEMORY = 13
    NO_ROOM = 14
    SEQUENCE_FULL = 15
    STALE_HANDLE = 16
    TRUNCATED = 17
    CORRUPT = 18
    IO_ERROR = 19
    UNSUPPORTED_VERSION = 20
    OTHER_CONFIGURATION = 21

    @classmethod
    def _missing_(cls, value: object) -> Status:
        # A newer library may know more: those keep their number.
        member = int.__new__(cls, int(value))  # type: ignore[call-overload]
        member._name_, member._value_ = f"STATUS_{value}", int(value)  # type: ignore[call-overload]
        return member


class KvarnError(Exception):
    """The library refused a call; nothing has changed.

    status: which of the library's statuses; argument: the parameter that it is about, where that is known.
    """

    def __init__(self, status: int, where: str, argument: str | None = None, detail: str | None = None):
        self.status = Status(status)
        self.where = where
        self.argument = argument
        text = lib.kvarn_message(int(status)).decode()
        if detail:
            text = f"{text} ({detail})"
        super().__init__(f"{where}: {f'{argument}: ' if argument else ''}{text} [{self.status.name}]")

    def __reduce__(self) -> Any:
        return (_plain_error, (str(self), int(self.status), self.where, self.argument))


KvarnError.__module__ = "kvarn"  # where everybody has it from


def _plain_error(text: str, status: int, where: str, argument: str | None) -> KvarnError:
    error = KvarnError(status, where, argument)
    error.args = (text,)
    return error


def check(status: int, where: str, argument: str | None = None, detail: str | None = None) -> None:
    if status != 0:
        raise KvarnError(status, where, argument, detail)


# --- structs ------------------------------------------------------------------------------------------------


def integer(value: Any) -> Any:
    """An integer of NumPy as one of Python, which ctypes wants; everything else as it is."""
    return int(value) if isinstance(value, np.integer) else value


class Sized(ctypes.Structure):
    """A struct that begins with its size. Fields that are not given have the defaults of its _INIT."""

    DEFAULTS: dict[str, Any] = {}

    def __init__(self, **fields: Any):
        super().__init__()
        self.size = ctypes.sizeof(self)
        for name, value in {**self.DEFAULTS, **fields}.items():
            number = integer(value)
            setattr(self, name, number)
            if (
                isinstance(number, int) and getattr(self, name) != number
            ):  # ctypes does not say that it did not fit
                raise ValueError(f"{name}: {value} is out of range")


class View(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("tokens", c_size_t),
        ("heads", c_size_t),
        ("channels", c_size_t),
        ("token_stride", c_ssize_t),
        ("head_stride", c_ssize_t),
        ("channel_stride", c_ssize_t),
        ("type", c_int32),
        ("reserved", c_int32),
    ]

    def __init__(self, *args: Any, **fields: Any):
        super().__init__(*args, **({"channel_stride": 1, **fields} if not args else fields))


class CFormat(Sized):
    _fields_ = [("size", c_size_t)] + [
        (name, c_int32)
        for name in (
            "head_dim_k",
            "head_dim_v",
            "key_bits",
            "value_bits",
            "group",
            "key_rotation",
            "value_rotation",
            "exact_channels",
        )
    ]
    DEFAULTS = dict(
        head_dim_k=128, head_dim_v=128, key_bits=4, value_bits=2, group=128, key_rotation=1, value_rotation=1
    )


class CLayout(Sized):
    _fields_ = [
        (name, c_size_t)
        for name in (
            "size",
            "k_codes",
            "k_channel_scale",
            "k_channel_zero",
            "k_token_scale",
            "v_codes",
            "v_channel_scale",
            "v_token_scale",
            "v_token_zero",
            "exact",
            "content_bytes",
        )
    ]


class CSupport(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("arch", c_char_p),
        ("fixed_bounds", c_int32),
        ("key_precision", c_int32),
        ("value_precision", c_int32),
        ("time", c_float),
    ]


class CRecords(ctypes.Structure):
    _fields_ = [("data", c_void_p)] + [
        (name, c_size_t) for name in ("bytes", "tiles", "heads", "tile_stride", "head_stride", "record_bytes")
    ]


class CEncodeOptions(Sized):
    _fields_ = [("size", c_size_t)] + [
        (name, c_int32)
        for name in (
            "encoder",
            "iterations",
            "refined_iterations",
            "refit_rounds",
            "clip_steps",
            "key_basis",
            "value_basis",
            "reserved",
        )
    ]
    DEFAULTS = dict(encoder=1, iterations=8, refined_iterations=1, refit_rounds=5, clip_steps=2)


class CPartErrors(ctypes.Structure):
    _fields_ = [
        ("worst_scale_error", c_float),
        ("worst_relative_error", c_float),
        ("relative_error", c_float),
    ]


class CRecordErrors(ctypes.Structure):
    _fields_ = [("k", CPartErrors), ("v", CPartErrors)]


class CSegment(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("tokens", c_size_t),
        ("position", c_int64),
        ("k", View),
        ("v", View),
        ("head", c_size_t),
        ("key_basis", c_int32),
        ("value_basis", c_int32),
        ("data", c_void_p),
        ("stride", c_ssize_t),
        ("table", c_void_p),
        ("list", c_void_p),
        ("records", c_size_t),
        ("skip", c_size_t),
    ]
    DEFAULTS = dict(position=-1)


class CTask(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("history", POINTER(CSegment)),
        ("history_count", c_size_t),
        ("q", View),
        ("out", View),
        ("log_sum_exp", c_void_p),
        ("sink_logits", c_void_p),
        ("alibi_slopes", c_void_p),
        ("first_position", c_int64),
        ("format", POINTER(CFormat)),
        ("mask", c_void_p),
        ("mask_stride", c_size_t),
        ("mask_tokens", c_size_t),
    ]
    DEFAULTS = dict(first_position=-1)


class CAttentionOptions(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("softmax_scale", c_float),
        ("logit_soft_cap", c_float),
        ("window", c_int64),
        ("causal", c_int32),
        ("query_basis", c_int32),
        ("output_basis", c_int32),
        ("precision", c_int32),
        ("fast_bound", c_float),
        ("reserved", c_int32),
    ]
    DEFAULTS = dict(causal=1, precision=1, fast_bound=0.03)


class CChooseOptions(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("margin", c_float),
        ("value_margin", c_float),
        ("most_key_error", c_float),
        ("most_value_error", c_float),
        ("encode", POINTER(CEncodeOptions)),
    ]
    DEFAULTS = dict(margin=1.5, value_margin=2.0)


class CBitRule(Sized):
    _fields_ = [("size", c_size_t)] + [
        (name, c_int32)
        for name in (
            "first_layer",
            "last_layer",
            "first_head",
            "last_head",
            "key_bits",
            "value_bits",
            "key_rotation",
            "value_rotation",
        )
    ]
    DEFAULTS = dict(
        last_layer=-1, last_head=-1, key_bits=-1, value_bits=-1, key_rotation=-1, value_rotation=-1
    )


class CCacheConfig(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("format", POINTER(CFormat)),
        ("rules", POINTER(CBitRule)),
        ("rule_count", c_size_t),
        ("layers", c_int32),
        ("heads", c_int32),
        ("exact", c_int32),
        ("key_basis", c_int32),
        ("value_basis", c_int32),
        ("reserved", c_int32),
        ("sink_tokens", c_size_t),
        ("recent_tokens", c_size_t),
        ("sequences", c_size_t),
        ("most_tokens", c_size_t),
        ("most_step", c_size_t),
        ("record_blocks", c_size_t),
        ("exact_blocks", c_size_t),
        ("most_spans", c_size_t),
        ("encode", POINTER(CEncodeOptions)),
    ]
    DEFAULTS = dict(exact=1, sink_tokens=128, sequences=1, most_tokens=4096, most_step=1)


class CCachePlan(Sized):
    _fields_ = [
        (name, c_size_t)
        for name in (
            "size",
            "bytes",
            "records",
            "exact",
            "state",
            "record_block_bytes",
            "exact_block_bytes",
            "record_blocks",
            "exact_blocks",
        )
    ]


class CSequencePlan(Sized):
    _fields_ = [(name, c_size_t) for name in ("size", "record_bytes", "exact_bytes", "elements")] + [
        ("bits_per_element", c_double)
    ]


class CSequence(ctypes.Structure):
    _fields_ = [("slot", c_uint32), ("generation", c_uint32)]


class CSequenceRoom(ctypes.Structure):
    _fields_ = [("sequence", CSequence), ("tokens", c_size_t)]


class CPoolStatistics(Sized):
    _fields_ = [
        (name, c_size_t)
        for name in (
            "size",
            "records_used",
            "records_free",
            "records_shared",
            "exact_used",
            "exact_free",
            "exact_shared",
            "bytes_used",
            "tiles_sealed",
            "tiles_kept_not_finite",
            "tiles_kept_overflowed",
            "sequences",
        )
    ]


class CSequenceStatistics(Sized):
    _fields_ = [
        (name, c_size_t)
        for name in (
            "size",
            "tokens",
            "drafts",
            "sealed_tokens",
            "dead_tokens",
            "kept_tiles",
            "record_blocks",
            "exact_blocks",
            "spans",
            "own_records",
            "own_exact",
        )
    ] + [("next_position", c_int64)]


class CSealReport(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("sealed", c_size_t),
        ("kept_exact", c_size_t),
        ("dropped", c_size_t),
        ("unfinished", c_size_t),
        ("sequence", CSequence),
        ("position", c_int64),
        ("layer", c_size_t),
        ("head", c_size_t),
        ("why", c_int32),
        ("reserved", c_int32),
    ]


class CStep(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("sequence", CSequence),
        ("k", View),
        ("v", View),
        ("first_draft", c_size_t),
        ("q", View),
        ("out", View),
        ("log_sum_exp", c_void_p),
        ("sink_logits", c_void_p),
        ("alibi_slopes", c_void_p),
        ("mask", c_void_p),
        ("mask_stride", c_size_t),
        ("mask_tokens", c_size_t),
    ]


class CLayerOptions(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("attention", POINTER(CAttentionOptions)),
        ("threads", c_size_t),
        ("rows_per_task", c_size_t),
        ("chunks_per_item", c_size_t),
    ]
    DEFAULTS = dict(threads=1, rows_per_task=32, chunks_per_item=4)


class CShiftReport(Sized):
    _fields_ = [
        ("size", c_size_t),
        ("tokens", c_size_t),
        ("sealed_tokens", c_size_t),
        ("relative_error", c_double),
    ]


TURN = ctypes.CFUNCTYPE(None, c_void_p, c_size_t, c_size_t, c_void_p, c_size_t, c_size_t, c_int64)
WRITE = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_size_t)
READ = ctypes.CFUNCTYPE(c_size_t, c_void_p, c_void_p, c_size_t)

#: Structs by their names in the header, for the test of their layout.
STRUCTS = {
    "kvarn_view": View,
    "kvarn_format": CFormat,
    "kvarn_record_layout": CLayout,
    "kvarn_support": CSupport,
    "kvarn_records": CRecords,
    "kvarn_encode_options": CEncodeOptions,
    "kvarn_part_errors": CPartErrors,
    "kvarn_record_errors": CRecordErrors,
    "kvarn_segment": CSegment,
    "kvarn_attention_task": CTask,
    "kvarn_attention_options": CAttentionOptions,
    "kvarn_choose_options": CChooseOptions,
    "kvarn_bit_rule": CBitRule,
    "kvarn_cache_config": CCacheConfig,
    "kvarn_cache_plan": CCachePlan,
    "kvarn_sequence_plan": CSequencePlan,
    "kvarn_sequence": CSequence,
    "kvarn_sequence_room": CSequenceRoom,
    "kvarn_pool_statistics": CPoolStatistics,
    "kvarn_sequence_statistics": CSequenceStatistics,
    "kvarn_seal_report": CSealReport,
    "kvarn_step": CStep,
    "kvarn_layer_options": CLayerOptions,
    "kvarn_shift_report": CShiftReport,
}

# --- functions ----------------------------------------------------------------------------------------------
# s a status, z size_t, i int32, q int64, Q uint64, d double, t text, p any pointer, v nothing, S a sequence

_KINDS = {
    "s": c_int32,
    "z": c_size_t,
    "i": c_int32,
    "q": c_int64,
    "Q": c_uint64,
    "d": c_double,
    "t": c_char_p,
    "p": c_void_p,
    "v": None,
    "S": CSequence,
}

#: name: result and parameters. Structs go by their address (ctypes.byref).
FUNCTIONS = {
    "message": "t i",
    "version": "t",
    "abi": "i",
    "has_files": "i",
    "active_arch": "t",
    "usable_arch": "t z",
    "select_arch": "s t",
    "convert": "s pp",
    "rotate": "s p",
    "unrotate": "s p",
    "format_parse": "s tiip",
    "format_make": "s p",
    "format_within": "s pdp",
    "layout_of": "s pp",
    "record_bytes": "z pz",
    "bits_per_element": "d pz",
    "scratch_bytes": "z p",
    "call_scratch_bytes": "z pz",
    "supports": "s piip",
    "quantize_items": "s pppppzzpzpz",
    "dequantize_items": "s ppppizzpz",
    "exact_tokens": "s ppziip",
    "sealed_tiles": "s ppzzzp",
    "segment_tokens": "s pzzp",
    "attention_bytes": "z ppz",
    "attention_plan": "s ppzpzpzp",
    "attention_items": "z p",
    "attend_item": "s pzpz",
    "combine_item": "s pzpz",
    "add_query_moments": "s pppz",
    "choose_format": "s ppppzppzp",
    "choose_scratch_bytes": "z p",
    "plan_cache": "s pp",
    "fit_cache": "s pzp",
    "plan_sequence": "s pzp",
    "cache_scratch_bytes": "z pz",
    "pool_make": "s ppzp",
    "pool_config": "s pp",
    "pool_format": "s pzzp",
    "pool_set_format": "s pzzp",
    "statistics_of_pool": "s pp",
    "statistics_of": "s pSp",
    "open": "s pqp",
    "close": "s pS",
    "reserve": "s pSz",
    "reserve_batch": "s ppzp",
    "store": "s pSzppzz",
    "commit": "s pSz",
    "commit_path": "s pSpz",
    "truncate": "s pSq",
    "erase": "s pSqq",
    "evict_front": "s pSz",
    "fork": "s pSp",
    "is_open": "i pS",
    "tokens": "z pS",
    "drafts": "z pS",
    "next_position": "q pS",
    "count_tokens": "z pSqq",
    "read": "s pSzzqqpppz",
    "seal": "s pSzpzp",
    "ready_tiles": "z pS",
    "begin_seal": "s pSzp",
    "begin_seal_all": "s pzp",
    "seal_items": "z p",
    "seal_item": "s pzpz",
    "finish_seal": "s pzp",
    "cancel_seal": "z pS",
    "pool_moment_count": "z p",
    "pool_add_query_moments": "s pzppz",
    "pool_choose_bases": "s pSpzppzp",
    "choose_bases_scratch_bytes": "z p",
    "layer_bytes": "z ppzp",
    "layer_plan": "s pzpzppzpp",
    "store_items": "z p",
    "attend_items": "z p",
    "finish_items": "z p",
    "layer_store": "s pz",
    "layer_attend": "s pzpz",
    "layer_finish": "s pzpz",
    "layer_run": "s ppz",
    "shift_positions": "s pSqqqpppzp",
    "shift_scratch_bytes": "z p",
    "save": "s pSzzpp",
    "saved_bytes": "Q pSzz",
    "save_to": "s pSzzpz",
    "load": "s pppipp",
    "load_from": "s ppzpp",
    "loader_bytes": "z",
    "loader_make": "s ppzp",
    "loader_part": "s pppip",
    "loader_finish": "s pp",
    "loader_end": "v p",
}


def find_library() -> pathlib.Path:
    """KVARN_LIBRARY, or the library beside this file, where `pip install` puts it."""
    named = os.environ.get("KVARN_LIBRARY")
    if named:
        if not pathlib.Path(named).is_file():
            raise ImportError(f"kvarn: KVARN_LIBRARY names no file: {named}")
        return pathlib.Path(named)
    folder = pathlib.Path(__file__).resolve().parent
    for name in {"darwin": ("libkvarn.dylib",), "win32": ("kvarn.dll", "libkvarn.dll")}.get(
        sys.platform, ("libkvarn.so",)
    ):
        if (folder / name).is_file():
            return folder / name
    raise ImportError(
        "kvarn: the shared library is missing. Either `pip install ./examples/python`, which builds it, or "
        "set "
        "KVARN_LIBRARY to the path of one that kvarn_add_c_library made (docs/c-api.md)"
    )


def load_library(path: pathlib.Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.kvarn_abi.restype = c_int32
        abi = library.kvarn_abi()
    except (OSError, AttributeError) as error:
        raise ImportError(f"kvarn: {path} is not a library of kvarn for this machine: {error}") from error
    if abi != ABI:
        raise ImportError(f"kvarn: {path} has the C interface {abi}, this module needs {ABI}")
    for name, kinds in FUNCTIONS.items():
        result, _, parameters = kinds.partition(" ")
        try:
            function = getattr(library, "kvarn_" + name)
        except AttributeError as error:
            raise ImportError(
                f"kvarn: {path} has no function kvarn_{name}: it is older than this module"
            ) from error
        function.restype = _KINDS[result]
        function.argtypes = [_KINDS[kind] for kind in parameters]
    return library


path = find_library()
lib = load_library(path)
