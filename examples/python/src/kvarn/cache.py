# SPDX-License-Identifier: Apache-2.0
"""A whole cache: sequences that grow by drafts, are committed, rolled back, cut, forked, sealed, saved and
loaded.

docs/cache.md says what a block, a draft, the sink and a ready tile are.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import os
from collections.abc import Sequence as Many
from typing import Any, BinaryIO, Callable, NamedTuple, Union

import numpy as np
import numpy.typing as npt

from . import _work
from ._arrays import ArrayLike, Values, address, element_type, float_row, new_values
from ._c import (
    READ,
    SIZE_MAX,
    TURN,
    WRITE,
    CBitRule,
    CCacheConfig,
    CCachePlan,
    CChooseOptions,
    CFormat,
    CLayerOptions,
    CPoolStatistics,
    CSealReport,
    CSequence,
    CSequencePlan,
    CSequenceRoom,
    CSequenceStatistics,
    CShiftReport,
    CStep,
    KvarnError,
    Status,
    View,
    check,
    integer,
    lib,
)
from .attention import AttentionOptions, mask_words, output_of
from .codec import Encoding, _pair
from .formats import Format, basis_number

#: What can be saved to and loaded from, besides bytes.
File = Union[str, "os.PathLike[str]", BinaryIO]


class CachePlan(NamedTuple):
    """Bytes and blocks of a pool: bytes = records + exact + state. A block holds a tile of tokens of all
    layers and heads.
    """

    bytes: int
    records: int
    exact: int
    state: int
    record_block_bytes: int
    exact_block_bytes: int
    record_blocks: int
    exact_blocks: int


class SequencePlan(NamedTuple):
    """What a sequence takes: bytes of sealed tiles, of sink and tail; values of K and V; bits for each of
    them.
    """

    record_bytes: int
    exact_bytes: int
    elements: int
    bits_per_element: float


class PoolStatistics(NamedTuple):
    """Blocks in use, free, and shared; bytes of used blocks; tiles sealed, and kept exact, so far; open
    sequences.
    """

    records_used: int
    records_free: int
    records_shared: int
    exact_used: int
    exact_free: int
    exact_shared: int
    bytes_used: int
    tiles_sealed: int
    tiles_kept_not_finite: int
    tiles_kept_overflowed: int
    sequences: int


class SequenceStatistics(NamedTuple):
    """Tokens, drafts, tokens in records; places it does not see any more; tiles that stayed exact; blocks and
    spans; blocks that nobody else holds; where the next draft goes.
    """

    tokens: int
    drafts: int
    sealed_tokens: int
    dead_tokens: int
    kept_tiles: int
    record_blocks: int
    exact_blocks: int
    spans: int
    own_records: int
    own_exact: int
    next_position: int


class KeptTile(NamedTuple):
    """A tile that no record can hold: the position of its first token, where, and why."""

    position: int
    layer: int
    head: int
    why: Status


class SealReport(NamedTuple):
    """Tiles that are records now, that stayed exact, that their sequence left meanwhile, and that are not
    done.
    """

    sealed: int
    kept_exact: int
    dropped: int
    unfinished: int
    first_kept: KeptTile | None


class ShiftReport(NamedTuple):
    """Tokens that moved, those of them in records, and the relative error that their new encoding adds to
    keys.
    """

    tokens: int
    sealed_tokens: int
    relative_error: float


def _tuple(kind: Any, c: Any) -> Any:
    return kind(*(getattr(c, name) for name in kind._fields))


def _report(c: CSealReport) -> SealReport:
    kept = KeptTile(c.position, c.layer, c.head, Status(c.why)) if c.kept_exact else None
    return SealReport(c.sealed, c.kept_exact, c.dropped, c.unfinished, kept)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Other bits, or another basis, for some heads of some layers. layers, heads: first and last, ends
    included, negative ones count from the end. None leaves a part as it is.
    """

    layers: tuple[int, int] = (0, -1)
    heads: tuple[int, int] = (0, -1)
    key_bits: int | None = None
    value_bits: int | None = None
    key_rotated: bool | None = None
    value_rotated: bool | None = None

    def _make(self) -> CBitRule:
        def number(value: int | bool | None) -> int:
            return -1 if value is None else int(value)

        return CBitRule(
            first_layer=self.layers[0],
            last_layer=self.layers[1],
            first_head=self.heads[0],
            last_head=self.heads[1],
            key_bits=number(self.key_bits),
            value_bits=number(self.value_bits),
            key_rotation=number(self.key_rotated),
            value_rotation=number(self.value_rotated),
        )


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Everything that a cache is told once. Units are tokens and blocks.

    exact: element type of tokens that are no records: "float16", "float32" or "bfloat16". sink_tokens: at the
    start of each sequence, never sealed; rounded up to whole tiles. recent_tokens: the newest, not sealed
    yet. sequences: open at once. most_tokens: of one sequence, drafts included. most_step: tokens of one step
    at most. record_blocks, exact_blocks, most_spans: 0 is enough for all sequences at most_tokens. key_basis,
    value_basis: of K and V as they are stored.
    """

    format: Format
    layers: int
    heads: int
    rules: tuple[Rule, ...] = ()
    exact: str = "float16"
    key_basis: str = "original"
    value_basis: str = "original"
    sink_tokens: int = 128
    recent_tokens: int = 0
    sequences: int = 1
    most_tokens: int = 4096
    most_step: int = 1
    record_blocks: int = 0
    exact_blocks: int = 0
    most_spans: int = 0
    encoding: Encoding = Encoding()

    def _make(self) -> CCacheConfig:
        if not isinstance(self.format, Format):
            raise TypeError(f"format: expected a kvarn.Format, not {type(self.format).__name__}")
        for name in ("layers", "heads", "sequences", "most_tokens", "most_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1, not {getattr(self, name)}")
        for name in ("sink_tokens", "recent_tokens", "record_blocks", "exact_blocks", "most_spans"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: at least 0, not {getattr(self, name)}")
        rules = (CBitRule * len(self.rules))(*(rule._make() for rule in self.rules))
        encode = self.encoding._make()
        made = CCacheConfig(
            format=ctypes.pointer(self.format._c),
            rules=rules if self.rules else None,
            rule_count=len(self.rules),
            layers=self.layers,
            heads=self.heads,
            exact=element_type(self.exact, "exact")[0],
            key_basis=basis_number(self.key_basis, "key_basis"),
            value_basis=basis_number(self.value_basis, "value_basis"),
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
            sequences=self.sequences,
            most_tokens=self.most_tokens,
            most_step=self.most_step,
            record_blocks=self.record_blocks,
            exact_blocks=self.exact_blocks,
            most_spans=self.most_spans,
            encode=ctypes.pointer(encode),
        )
        made._keep = (rules, encode)  # what its pointers point to
        return made

    def plan(self) -> CachePlan:
        """What a cache takes, to the byte."""
        made = CCachePlan()
        check(lib.kvarn_plan_cache(ctypes.byref(self._make()), ctypes.byref(made)), "CacheConfig.plan")
        return _tuple(CachePlan, made)  # type: ignore[no-any-return]

    def plan_sequence(self, tokens: int) -> SequencePlan:
        """What one sequence of so many tokens takes, all layers and heads."""
        made = CSequencePlan()
        check(
            lib.kvarn_plan_sequence(ctypes.byref(self._make()), tokens, ctypes.byref(made)),
            "CacheConfig.plan_sequence",
            "tokens",
        )
        return _tuple(SequencePlan, made)  # type: ignore[no-any-return]

    def fit(self, memory_bytes: int) -> CacheConfig:
        """With as many record blocks as fit into so many bytes of memory, but no more than it has."""
        made = CCacheConfig()
        check(
            lib.kvarn_fit_cache(ctypes.byref(self._make()), memory_bytes, ctypes.byref(made)),
            "CacheConfig.fit",
            "memory_bytes",
        )
        return dataclasses.replace(
            self,
            record_blocks=made.record_blocks,
            exact_blocks=made.exact_blocks,
            most_spans=made.most_spans,
            sink_tokens=made.sink_tokens,
        )


@dataclasses.dataclass(eq=False)
class Step:
    """One sequence in one layer for one step.

    q: [query heads, m, channels], queries of its newest m positions, drafts included; None: stores only. k,
    v: [KV heads, tokens, channels] of its drafts from `first_draft` on; None: stored already. out: where to
    write, [query heads, m, head_dim_v]. log_sum_exp: also say it. sink_logits, alibi_slopes: [query heads].
    mask: as for kvarn.attend.
    """

    sequence: Sequence
    q: ArrayLike | None = None
    k: ArrayLike | None = None
    v: ArrayLike | None = None
    first_draft: int = 0
    out: ArrayLike | None = None
    log_sum_exp: bool = False
    sink_logits: ArrayLike | None = None
    alibi_slopes: ArrayLike | None = None
    mask: Any = None


class Cache:
    """A pool of sequences in memory of its own; nothing else is allocated later. A context manager.

    Either Cache(config), or the fields of a CacheConfig: Cache(format, layers=2, heads=2, sequences=4,
    most_tokens=4096, most_step=64). memory_bytes: no more than that, with as many record blocks as fit.
    """

    def __init__(self, config: CacheConfig | Format, *, memory_bytes: int | None = None, **fields: Any):
        if isinstance(config, CacheConfig):
            config = dataclasses.replace(config, **fields)
        else:
            config = CacheConfig(config, **fields)
        if memory_bytes is not None:
            config = config.fit(memory_bytes)
        self.config = config
        self.plan = config.plan()
        self._config = config._make()
        self._memory: npt.NDArray[np.uint8] | None = np.empty(self.plan.bytes, np.uint8)
        self._pool = ctypes.c_void_p()
        check(
            lib.kvarn_pool_make(
                ctypes.byref(self._config), address(self._memory), self._memory.size, ctypes.byref(self._pool)
            ),
            "Cache",
        )

    def close(self) -> None:
        """Drops the memory, and all sequences with it."""
        self._memory = None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _handle(self) -> ctypes.c_void_p:
        if self._memory is None:
            raise ValueError("the cache is closed")
        return self._pool

    def _scratch_bytes(self, rows: int = 0) -> int:
        return int(lib.kvarn_cache_scratch_bytes(ctypes.byref(self._config), rows))

    def _scratch(self, rows: int = 0) -> npt.NDArray[np.uint8]:
        return np.empty(self._scratch_bytes(rows), np.uint8)

    def format(self, layer: int, head: int) -> Format:
        """Of one head, after rules and chosen bases."""
        made = CFormat()
        check(
            lib.kvarn_pool_format(self._handle, layer, head, ctypes.byref(made)),
            "Cache.format",
            "layer or head",
        )
        return Format._of_c(made)

    def set_format(self, layer: int, head: int, format: Format) -> None:
        """Other bases for one head, before the first record."""
        check(lib.kvarn_pool_set_format(self._handle, layer, head, format._ref), "Cache.set_format", "format")

    @property
    def statistics(self) -> PoolStatistics:
        made = CPoolStatistics()
        check(lib.kvarn_statistics_of_pool(self._handle, ctypes.byref(made)), "Cache.statistics")
        return _tuple(PoolStatistics, made)  # type: ignore[no-any-return]

    def open(self, first_position: int = 0) -> Sequence:
        """A new sequence, its first token at `first_position`."""
        made = CSequence()
        status = lib.kvarn_open(self._handle, first_position, ctypes.byref(made))
        check(status, "Cache.open", "first_position" if status == Status.BAD_ARGUMENT else None)
        return Sequence(self, made)

    # --- attention ---

    def step(
        self,
        layer: int,
        steps: Many[Step],
        *,
        options: AttentionOptions = AttentionOptions(),
        threads: _work.Threads = 1,
    ) -> list[Any]:
        """Stores and attends one layer of a batch; a sequence comes once. For each step its output, or None
        without queries, or the pair of output and log-sum-exp [query heads, m] where that was asked for.
        Outputs are float32 unless the step says where to write. The same bits for any number of threads.
        """
        steps, layer = list(steps), integer(layer)
        made = (CStep * max(len(steps), 1))()
        keep: list[Any] = []
        outputs: list[Any] = []
        sums: list[Any] = []
        most_rows = 1
        for i, step in enumerate(steps):
            name = f"steps[{i}]." if len(steps) > 1 else ""
            format = self.config.format
            if step.sequence._cache is not self:
                raise ValueError(f"{name}sequence: is of another cache")
            view = CStep(sequence=step.sequence._c, first_draft=step.first_draft)
            k, v = _pair(format, step.k, step.v, tiles=False, names=(name + "k", name + "v"))
            if k is not None and k.heads != self.config.heads:
                raise ValueError(f"{name}k: {k.heads} heads, the cache has {self.config.heads}")
            if (k is None) != (v is None) and (k is None or format.has_values):
                raise ValueError(f"{name}{'v' if v is None else 'k'}: is missing")
            view.k = View() if k is None else k.view()
            view.v = View() if v is None else v.view()
            out, lse = None, None
            if step.q is not None:
                q = Values(step.q, name + "q")
                if q.channels != format.key_channels:
                    raise ValueError(f"{name}q: {q.channels} channels, {format} has {format.key_channels}")
                if q.heads % self.config.heads or q.heads == 0:
                    raise ValueError(
                        f"{name}q: {q.heads} query heads are no multiple of {self.config.heads} KV heads"
                    )
                rows = q.heads // self.config.heads
                most_rows = max(most_rows, rows)
                out, values = output_of(step.out, name + "out", q.heads, q.tokens, format.head_dim_v)
                view.q, view.out = q.view(), values.view()
                if step.log_sum_exp:
                    lse = np.empty((self.config.heads, q.tokens, rows), np.float32)
                    view.log_sum_exp = address(lse)
                sinks = float_row(step.sink_logits, q.heads, name + "sink_logits")
                slopes = float_row(step.alibi_slopes, q.heads, name + "alibi_slopes")
                words = mask_words(step.mask, q.tokens)
                view.sink_logits, view.alibi_slopes, view.mask = (
                    address(sinks),
                    address(slopes),
                    address(words),
                )
                if words is not None:
                    view.mask_stride, view.mask_tokens = words.shape[1], np.asarray(step.mask).shape[1]
                keep.append((q, values, sinks, slopes, words))
            keep.append((k, v))
            made[i] = view
            outputs.append(out)
            sums.append(lse)

        attention = options._make()
        rows_per_task = max(32, most_rows)
        layer_options = CLayerOptions(
            attention=ctypes.pointer(attention), threads=_work.count_of(threads), rows_per_task=rows_per_task
        )
        pool = self._handle
        memory = np.empty(
            max(1, int(lib.kvarn_layer_bytes(pool, made, len(steps), ctypes.byref(layer_options)))), np.uint8
        )
        items, failed = ctypes.c_void_p(), ctypes.c_size_t(SIZE_MAX)
        status = lib.kvarn_layer_plan(
            pool,
            layer,
            made,
            len(steps),
            ctypes.byref(layer_options),
            address(memory),
            memory.size,
            ctypes.byref(items),
            ctypes.byref(failed),
        )
        if status:
            which = f"steps[{failed.value}]" if failed.value < len(steps) else "layer or options"
            raise KvarnError(status, f"Cache.step(layer={layer})", which)

        def checked(status: int, item: int) -> None:
            if status:
                raise KvarnError(
                    status,
                    f"Cache.step(layer={layer})",
                    "q" if status == Status.NOT_FINITE else None,
                    f"item {item}",
                )

        _work.run(
            int(lib.kvarn_store_items(items)),
            0,
            threads,
            lambda item, _: checked(lib.kvarn_layer_store(items, item), item),
        )
        scratch = self._scratch_bytes(rows_per_task)

        def attend(item: int, space: npt.NDArray[np.uint8]) -> None:
            checked(lib.kvarn_layer_attend(items, item, address(space), space.size), item)

        def finish(item: int, space: npt.NDArray[np.uint8]) -> None:
            checked(lib.kvarn_layer_finish(items, item, address(space), space.size), item)

        _work.run(int(lib.kvarn_attend_items(items)), scratch, threads, attend)
        _work.run(int(lib.kvarn_finish_items(items)), scratch, threads, finish)
        del keep
        return [
            out
            if lse is None
            else (out, np.ascontiguousarray(lse.transpose(0, 2, 1)).reshape(-1, lse.shape[1]))
            for out, lse in zip(outputs, sums)
        ]

    def reserve(self, sequences: Many[Sequence], tokens: Many[int] | int) -> None:
        """Room for so many more drafts of each sequence, in all layers: for all of them, or nothing has
        changed. `tokens`: one number for all, or one for each.
        """
        if isinstance(tokens, (int, np.integer)):
            tokens = [tokens] * len(sequences)
        if len(tokens) != len(sequences):
            raise ValueError(f"tokens: {len(tokens)} numbers for {len(sequences)} sequences")
        for sequence in sequences:
            if sequence._cache is not self:
                raise ValueError("sequences: one is of another cache")
        batch = (CSequenceRoom * len(sequences))(
            *(CSequenceRoom(s._c, integer(n)) for s, n in zip(sequences, tokens))
        )
        failed = ctypes.c_size_t()
        status = lib.kvarn_reserve_batch(self._handle, batch, len(batch), ctypes.byref(failed))
        check(status, "Cache.reserve", f"sequences[{failed.value}]")

    # --- sealing by items ---

    def begin_seal(self, sequence: Sequence | None = None, most: int | None = None) -> int:
        """Queues up to `most` ready tiles of a sequence, or of all (None), by turns; says how many."""
        queued = ctypes.c_size_t()
        number = SIZE_MAX if most is None else most
        check(
            lib.kvarn_begin_seal_all(self._handle, number, ctypes.byref(queued))
            if sequence is None
            else lib.kvarn_begin_seal(self._handle, sequence._c, number, ctypes.byref(queued)),
            "Cache.begin_seal",
            None if sequence is None else "sequence",
        )
        return int(queued.value)

    @property
    def seal_items(self) -> int:
        """Items in the queue that are not done: layers x heads for each tile."""
        return int(lib.kvarn_seal_items(self._handle))

    def run_seal_items(self, items: int | None = None, *, threads: _work.Threads = 1) -> int:
        """Does the first `items` items of the queue, over threads, beside whatever else; says how many.
        finish_seal then makes them count.
        """
        count = self.seal_items if items is None else min(items, self.seal_items)
        pool = self._handle
        _work.run(
            count,
            self._scratch_bytes(),
            threads,
            lambda item, scratch: check(
                lib.kvarn_seal_item(pool, item, address(scratch), scratch.size), "Cache.run_seal_items"
            ),
        )
        return count

    def finish_seal(self, items: int) -> SealReport:
        """The first `items` items are done: their tiles become records, or stay exact where no record can
        hold them.
        """
        report = CSealReport()
        check(lib.kvarn_finish_seal(self._handle, items, ctypes.byref(report)), "Cache.finish_seal", "items")
        return _report(report)

    # --- bases by data ---

    def moments(self) -> npt.NDArray[np.uint64]:
        """Room for the moments of queries, zero."""
        return np.zeros(int(lib.kvarn_pool_moment_count(self._handle)), np.uint64)

    def add_query_moments(self, layer: int, q: ArrayLike, moments: npt.NDArray[np.uint64]) -> None:
        """Adds a layer's queries [query heads, tokens, channels], as they meet K."""
        values = Values(q, "q")
        check(
            lib.kvarn_pool_add_query_moments(
                self._handle, layer, ctypes.byref(values.view()), address(moments), moments.size
            ),
            "Cache.add_query_moments",
            "layer or q",
        )

    def choose_bases(
        self,
        sequence: Sequence,
        moments: npt.NDArray[np.uint64],
        *,
        margin: float = 1.5,
        value_margin: float = 2.0,
    ) -> int:
        """Sets the bases of all heads by the first ready tile of a sequence, before the first record; says
        how many changed.
        """
        options = CChooseOptions(margin=margin, value_margin=value_margin)
        scratch = np.empty(int(lib.kvarn_choose_bases_scratch_bytes(self.config.format._ref)), np.uint8)
        changed = ctypes.c_size_t()
        check(
            lib.kvarn_pool_choose_bases(
                self._handle,
                sequence._c,
                address(moments),
                moments.size,
                ctypes.byref(options),
                address(scratch),
                scratch.size,
                ctypes.byref(changed),
            ),
            "Cache.choose_bases",
        )
        return int(changed.value)

    # --- loading ---

    def load(self, source: bytes | bytearray | memoryview | File, *more: Any) -> Sequence:
        """A sequence from bytes, a path or an open file; from several, each with the layers behind those of
        the one before. It exists when everything was read and verified; otherwise nothing of it is left.
        """
        made, differs = CSequence(), ctypes.c_char_p()

        def refused(status: int, argument: str = "source") -> None:
            check(
                status, "Cache.load", argument, differs.value.decode() if status and differs.value else None
            )

        if not more and isinstance(source, (bytes, bytearray, memoryview)):
            data = np.frombuffer(source, np.uint8)
            refused(
                lib.kvarn_load_from(
                    self._handle, address(data), data.size, ctypes.byref(made), ctypes.byref(differs)
                )
            )
            return Sequence(self, made)
        if not more:
            with _Reader(source) as reader:
                status = lib.kvarn_load(
                    self._handle,
                    reader.callback,
                    None,
                    int(reader.whole),
                    ctypes.byref(made),
                    ctypes.byref(differs),
                )
                reader.raise_error()
                refused(status)
            return Sequence(self, made)
        memory = np.empty(int(lib.kvarn_loader_bytes()), np.uint8)
        loader = ctypes.c_void_p()
        check(
            lib.kvarn_loader_make(self._handle, address(memory), memory.size, ctypes.byref(loader)),
            "Cache.load",
        )
        try:
            for i, part in enumerate((source, *more)):
                with _Reader(part) as reader:
                    status = lib.kvarn_loader_part(
                        loader, reader.callback, None, int(reader.whole), ctypes.byref(differs)
                    )
                    reader.raise_error()
                    refused(status, f"source {i}")
            refused(lib.kvarn_loader_finish(loader, ctypes.byref(made)))
        finally:
            lib.kvarn_loader_end(loader)
        return Sequence(self, made)

    def __repr__(self) -> str:
        if self._memory is None:
            return "Cache(closed)"
        return (
            f"Cache({self.config.format.name}, layers={self.config.layers}, heads={self.config.heads}, "
            f"bytes={self.plan.bytes}, "
            f"sequences={self.statistics.sequences} of {self.config.sequences})"
        )


class _Reader:
    """Bytes, a path or a file as the library's function that reads. A path and bytes must end with the
    content.
    """

    def __init__(self, source: Any):
        self.whole = isinstance(source, (bytes, bytearray, memoryview, str, os.PathLike))
        self.error: BaseException | None = None
        self.own = False
        if isinstance(source, (bytes, bytearray, memoryview)):
            self.file: Any = io.BytesIO(source)
        elif isinstance(source, (str, os.PathLike)):
            self.file, self.own = open(source, "rb"), True
        elif hasattr(source, "read"):
            self.file = source
        else:
            raise TypeError(f"source: expected bytes, a path or a binary file, not {type(source).__name__}")
        self.callback = READ(self._read)

    def _read(self, _: int | None, data: int, size: int) -> int:
        try:
            if hasattr(self.file, "readinto"):
                place = memoryview((ctypes.c_ubyte * size).from_address(data)).cast("B")
                return int(self.file.readinto(place) or 0)
            got = bytes(self.file.read(size))
            if len(got) > size:
                raise ValueError(f"source: read({size}) gave {len(got)} bytes")
            ctypes.memmove(data, got, len(got))
            return len(got)
        except BaseException as error:
            self.error = error
            return SIZE_MAX

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.own:
            self.file.close()


class Sequence:
    """A sequence of a cache. A context manager, which closes it."""

    def __init__(self, cache: Cache, c: CSequence):
        self._cache = cache
        self._c = c

    @property
    def cache(self) -> Cache:
        return self._cache

    def _call(self, function: Callable[..., int], *arguments: Any, argument: str | None = None) -> None:
        status = function(self._cache._handle, self._c, *map(integer, arguments))
        if status == Status.STALE_HANDLE:
            argument = "sequence"
        elif status in (Status.NO_ROOM, Status.SEQUENCE_FULL):
            argument = None
        check(status, "Sequence." + function.__name__.removeprefix("kvarn_"), argument)

    def close(self) -> None:
        """Gives its blocks back. Closing twice is fine."""
        if self._cache._memory is not None and self.is_open:
            self._call(lib.kvarn_close)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        return self._cache._memory is not None and bool(lib.kvarn_is_open(self._cache._handle, self._c))

    def __len__(self) -> int:
        """Committed tokens."""
        return int(lib.kvarn_tokens(self._cache._handle, self._c))

    @property
    def drafts(self) -> int:
        return int(lib.kvarn_drafts(self._cache._handle, self._c))

    @property
    def next_position(self) -> int:
        return int(lib.kvarn_next_position(self._cache._handle, self._c))

    @property
    def ready_tiles(self) -> int:
        """Tiles that can be sealed: full, committed, neither sink nor recent."""
        return int(lib.kvarn_ready_tiles(self._cache._handle, self._c))

    @property
    def statistics(self) -> SequenceStatistics:
        made = CSequenceStatistics()
        self._call(lib.kvarn_statistics_of, ctypes.byref(made))
        return _tuple(SequenceStatistics, made)  # type: ignore[no-any-return]

    # --- the life of tokens ---

    def reserve(self, tokens: int) -> None:
        """Room for so many more drafts in all layers."""
        self._call(lib.kvarn_reserve, tokens, argument="tokens")

    def store(
        self,
        layer: int,
        k: ArrayLike,
        v: ArrayLike | None = None,
        *,
        first_draft: int = 0,
        first_head: int = 0,
    ) -> None:
        """K and V [some KV heads, tokens, channels] of one layer, for the drafts from `first_draft` on."""
        values_k, values_v = _pair(self._cache.config.format, k, v, tiles=False)
        assert values_k is not None
        self._call(
            lib.kvarn_store,
            layer,
            ctypes.byref(values_k.view()),
            None if values_v is None else ctypes.byref(values_v.view()),
            first_draft,
            first_head,
            argument="layer, first_draft or heads" if values_v is not None else "v or layer",
        )

    def attend(
        self,
        layer: int,
        q: ArrayLike,
        k: ArrayLike | None = None,
        v: ArrayLike | None = None,
        *,
        threads: _work.Threads = 1,
        options: AttentionOptions = AttentionOptions(),
        **step: Any,
    ) -> Any:
        """Stores k and v, if given, and attends with q: Cache.step for this sequence alone; the rest as for
        Step. Returns the output [query heads, m, head_dim_v].
        """
        return self._cache.step(layer, [Step(self, q, k, v, **step)], options=options, threads=threads)[0]

    def commit(self, tokens: int | None = None, *, path: Many[int] | None = None) -> None:
        """The first `tokens` drafts (None: all) count from now on, the others are gone; or those of a path
        through a tree of drafts, by their numbers in rising order.
        """
        if path is not None:
            if tokens is not None:
                raise ValueError("path: or tokens, not both")
            numbers = np.asarray(path, np.uintp)
            self._call(lib.kvarn_commit_path, address(numbers), numbers.size, argument="path")
        else:
            self._call(lib.kvarn_commit, self.drafts if tokens is None else tokens, argument="tokens")

    def truncate(self, position: int) -> None:
        """Drops all drafts and every token at or behind `position`, in records too."""
        self._call(lib.kvarn_truncate, position, argument="position")

    def erase(self, begin: int, end: int) -> None:
        """Drops the tokens at positions [begin, end); the others keep theirs."""
        self._call(lib.kvarn_erase, begin, end, argument="begin or end")

    def evict_front(self, tokens: int) -> None:
        """Drops so many of the oldest tokens behind the sink."""
        self._call(lib.kvarn_evict_front, tokens, argument="tokens")

    def fork(self) -> Sequence:
        """A second sequence with the same tokens; blocks are shared until one of them changes."""
        made = CSequence()
        self._call(lib.kvarn_fork, ctypes.byref(made))
        return Sequence(self._cache, made)

    def count_tokens(self, begin: int, end: int) -> int:
        """Tokens at positions [begin, end), drafts included."""
        return int(lib.kvarn_count_tokens(self._cache._handle, self._c, begin, end))

    def read(
        self, layer: int, begin: int = 0, end: int | None = None, *, dtype: Any = np.float32
    ) -> tuple[Any, Any]:
        """What the cache holds at positions [begin, end): K [KV heads, tokens, channels] and V [KV heads,
        tokens, head_dim_v] (None without a V part), records decoded, in the bases of the configuration.
        """
        format, heads = self._cache.config.format, self._cache.config.heads
        stop = self.next_position if end is None else end
        tokens = self.count_tokens(begin, stop)
        k = new_values(heads, tokens, format.key_channels, dtype)
        v = new_values(heads, tokens, format.head_dim_v, dtype) if format.has_values else None
        values_k, values_v = _pair(format, k, v, tiles=False)
        assert values_k is not None
        scratch = self._cache._scratch()
        for head in range(heads):
            self._call(
                lib.kvarn_read,
                layer,
                head,
                begin,
                stop,
                ctypes.byref(values_k.view(head, 1)),
                None if values_v is None else ctypes.byref(values_v.view(head, 1)),
                address(scratch),
                scratch.size,
                argument="layer or drafts that are not stored",
            )
        return k, v

    def seal(self, most: int | None = None, *, threads: _work.Threads = 1) -> SealReport:
        """Turns up to `most` ready tiles into records, the oldest first. With several threads it also does
        what is queued already. A tile that a record cannot hold stays exact, which the report says.
        """
        if _work.count_of(threads) > 1:
            self._cache.begin_seal(self, most)
            return self._cache.finish_seal(self._cache.run_seal_items(threads=threads))
        report, scratch = CSealReport(), self._cache._scratch()
        self._call(
            lib.kvarn_seal,
            SIZE_MAX if most is None else most,
            address(scratch),
            scratch.size,
            ctypes.byref(report),
        )
        return _report(report)

    def cancel_seal(self) -> int:
        """Takes its tiles out of the queue of sealing; says how many."""
        return int(lib.kvarn_cancel_seal(self._cache._handle, self._c))

    def shift(
        self, begin: int, end: int, by: int, turn: Callable[[int, int, npt.NDArray[np.float32], int], None]
    ) -> ShiftReport:
        """Moves the tokens at positions [begin, end) by `by`. turn(layer, head, keys, position) applies the
        model's rotary embedding in place to keys [tokens, channels], of consecutive positions from `position`
        on. Sealed keys are encoded again. An exception of `turn` is raised when the call is over, and leaves
        keys that are not turned.
        """
        errors: list[BaseException] = []

        def call(
            _: int | None, layer: int, head: int, keys: int, tokens: int, channels: int, position: int
        ) -> None:
            try:
                memory = (ctypes.c_float * (tokens * channels)).from_address(keys)
                turn(layer, head, np.ctypeslib.as_array(memory).reshape(tokens, channels), position)
            except BaseException as error:
                errors.append(error)

        callback, report = TURN(call), CShiftReport()
        scratch = np.empty(int(lib.kvarn_shift_scratch_bytes(self._cache.config.format._ref)), np.uint8)
        self._call(
            lib.kvarn_shift_positions,
            begin,
            end,
            by,
            ctypes.cast(callback, ctypes.c_void_p),
            None,
            address(scratch),
            scratch.size,
            ctypes.byref(report),
            argument="begin, end or by",
        )
        if errors:
            raise errors[0]
        return _tuple(ShiftReport, report)  # type: ignore[no-any-return]

    # --- saving ---

    def saved_bytes(self, first_layer: int = 0, layers: int | None = None) -> int:
        """The size of what `save` gives."""
        return int(
            lib.kvarn_saved_bytes(
                self._cache._handle, self._c, first_layer, SIZE_MAX if layers is None else layers
            )
        )

    def save(
        self, file: File | None = None, *, first_layer: int = 0, layers: int | None = None
    ) -> bytearray | None:
        """Saves the layers [first_layer, first_layer + layers), None: all, to a path or an open binary file;
        without one, returns the bytes. Drafts must be committed or dropped before.
        """
        count = SIZE_MAX if layers is None else layers
        argument = "first_layer, or drafts that are not committed"
        if file is None:
            data = bytearray(self.saved_bytes(first_layer, layers))
            self._call(
                lib.kvarn_save_to,
                first_layer,
                count,
                (ctypes.c_char * len(data)).from_buffer(data) if data else None,
                len(data),
                argument=argument,
            )
            return data
        if isinstance(file, (str, os.PathLike)):
            with open(file, "wb") as opened:
                return self.save(opened, first_layer=first_layer, layers=layers)
        errors: list[BaseException] = []

        def write(_: int | None, data: int, size: int) -> int:
            try:
                rest = memoryview((ctypes.c_ubyte * size).from_address(data)).cast("B")
                while rest:
                    written = file.write(rest)
                    rest = rest[len(rest) if written is None else written :]
                return 0
            except BaseException as error:
                errors.append(error)
                return int(Status.IO_ERROR)

        callback = WRITE(write)
        status = lib.kvarn_save(
            self._cache._handle, self._c, first_layer, count, ctypes.cast(callback, ctypes.c_void_p), None
        )
        if errors:
            raise errors[0]
        check(status, "Sequence.save", "sequence" if status == Status.STALE_HANDLE else argument)
        return None

    def __repr__(self) -> str:
        if not self.is_open:
            return "Sequence(closed)"
        return f"Sequence(tokens={len(self)}, drafts={self.drafts}, next_position={self.next_position})"
