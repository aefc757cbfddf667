# SPDX-License-Identifier: Apache-2.0
"""A whole cache: rollback, forks, saving and restoring bit for bit; threads; errors."""

from __future__ import annotations

import io

import numpy as np
import pytest

import kvarn
from kvarn import _work

LAYERS, HEADS, ROWS, DIM = 2, 2, 2, 64
FORMAT = kvarn.Format("k4v2_g64", DIM)


def make(**fields):
    return kvarn.Cache(
        FORMAT,
        **{
            **dict(layers=LAYERS, heads=HEADS, sequences=6, most_tokens=1024, most_step=200, sink_tokens=64),
            **fields,
        },
    )


def tokens(begin, end):
    """K, V and queries of the tokens at these positions, the same whenever they are asked for."""
    rows = [
        np.random.default_rng(position).standard_normal((2 * HEADS + HEADS * ROWS, DIM)).astype(np.float32)
        for position in range(begin, end)
    ]
    all_rows = np.stack(rows, 1) if rows else np.zeros((2 * HEADS + HEADS * ROWS, 0, DIM), np.float32)
    return all_rows[:HEADS], all_rows[HEADS : 2 * HEADS], all_rows[2 * HEADS :]


def grow(sequence, count, accepted=None, threads=1):
    """A step of `count` tokens, of which the first `accepted` stay; the outputs of all layers."""
    k, v, q = tokens(sequence.next_position, sequence.next_position + count)
    sequence.reserve(count)
    out = [sequence.attend(layer, q, k, v, threads=threads) for layer in range(LAYERS)]
    sequence.commit(accepted)
    sequence.seal(threads=threads)
    return np.stack(out)


def test_a_sequence(values):
    with make() as cache, cache.open() as sequence:
        for count in (150, 1, 1, 200, 30):
            out = grow(sequence, count)
        assert (
            out.shape == (LAYERS, HEADS * ROWS, 30, DIM)
            and len(sequence) == 382
            and sequence.next_position == 382
        )
        numbers = sequence.statistics
        assert (numbers.tokens, numbers.drafts, numbers.sealed_tokens) == (382, 0, 256)
        assert cache.statistics.tiles_sealed == 4 and cache.statistics.sequences == 1
        assert "tokens=382" in repr(sequence) and "sequences=1 of 6" in repr(cache)
        # What the cache holds is what attention saw.
        k, v = sequence.read(1)
        expected_k, expected_v, q = tokens(0, 382)
        assert np.array_equal(k[:, :64], expected_k[:, :64].astype(np.float16)) and np.array_equal(
            v[:, 320:], expected_v[:, 320:].astype(np.float16)
        )
        error = np.linalg.norm(k - expected_k) / np.linalg.norm(expected_k)
        assert 0.02 < error < 0.15
        records = kvarn.quantize(
            FORMAT, expected_k[:, 64:320].astype(np.float16), expected_v[:, 64:320].astype(np.float16)
        )
        assert np.array_equal(kvarn.dequantize(records)[0], k[:, 64:320])
        again = kvarn.attend(q[:, -30:], [(k[:, :64], v[:, :64]), records, (k[:, 320:], v[:, 320:])])
        assert np.abs(again - out[1]).max() < 1e-3
        half, _ = sequence.read(0, 100, 110, dtype="float16")
        assert half.dtype == np.float16 and half.shape == (HEADS, 10, DIM)
    assert not sequence.is_open and repr(cache) == "Cache(closed)" and repr(sequence) == "Sequence(closed)"


def test_rollback_fork_save_and_restore_are_bit_for_bit(tmp_path):
    """Whatever way a sequence came to its tokens, its next outputs are the same bits."""
    with make() as cache:
        plain = cache.open()
        grow(plain, 200)
        grow(plain, 120)
        drafts = cache.open()
        grow(drafts, 200)
        grow(drafts, 130, accepted=120)
        back = cache.open()
        grow(back, 200)
        grow(back, 120)
        grow(back, 7)
        back.truncate(320)
        fork = plain.fork()
        shared = cache.statistics.records_shared
        assert shared == plain.statistics.record_blocks > 0 and plain.statistics.own_records == 0
        saved = plain.save()
        assert len(saved) == plain.saved_bytes()
        plain.save(tmp_path / "sequence")
        in_memory = io.BytesIO()
        plain.save(in_memory)
        assert (tmp_path / "sequence").read_bytes() == bytes(saved) == in_memory.getvalue()
        expected = grow(plain, 5)
        for other in (drafts, back, fork):
            assert len(other) == 320 and np.array_equal(grow(other, 5), expected)
            other.close()
        with make() as another:
            for source in (
                saved,
                bytes(saved),
                tmp_path / "sequence",
                str(tmp_path / "sequence"),
                io.BytesIO(bytes(saved)),
            ):
                with another.load(source) as restored:
                    assert len(restored) == 320 and np.array_equal(grow(restored, 5), expected)
        # Layer by layer, into several files.
        plain.truncate(320)
        parts = [plain.save(first_layer=layer, layers=1) for layer in range(LAYERS)]
        with cache.load(*parts) as restored:
            assert np.array_equal(grow(restored, 5), expected)


def test_truncate_inside_a_sealed_tile_and_erase():
    with make() as cache:
        sequence = cache.open()
        grow(sequence, 200)
        whole, _ = sequence.read(0)
        sequence.truncate(101)
        cut, _ = sequence.read(0)
        assert np.array_equal(cut, whole[:, :101]) and sequence.statistics.dead_tokens == 64 - 37
        sequence.erase(70, 80)
        left, _ = sequence.read(0)
        assert np.array_equal(left, np.concatenate([whole[:, :70], whole[:, 80:101]], 1))
        assert len(sequence) == 91 and sequence.next_position == 101 and sequence.count_tokens(60, 90) == 20
        sequence.evict_front(20)
        assert len(sequence) == 71 and sequence.count_tokens(0, 64) == 64


def test_threads_and_batches_give_the_same_bits():
    with make() as cache:
        a, b = cache.open(), cache.open(first_position=7)
        alone = grow(a, 200), grow(b, 150), grow(a, 3), grow(b, 100)
        c, d = cache.open(), cache.open(first_position=7)
        for counts, expected in (((200, 150), alone[:2]), ((3, 100), alone[2:])):
            steps = []
            cache.reserve((c, d), counts)
            for sequence, count in zip((c, d), counts):
                first = sequence.next_position - count
                k, v, q = tokens(first, first + count)
                steps.append(kvarn.Step(sequence, q, k, v))
            out = [cache.step(layer, steps, threads=3) for layer in range(LAYERS)]
            for i, sequence in enumerate((c, d)):
                assert np.array_equal(np.stack([of_layer[i] for of_layer in out]), expected[i])
                sequence.commit()
            assert cache.begin_seal() == c.ready_tiles + d.ready_tiles + cache.seal_items // (LAYERS * HEADS)
            items = cache.seal_items
            assert cache.run_seal_items(items, threads=3) == items
            report = cache.finish_seal(items)
            assert report.sealed == items // (LAYERS * HEADS) and report.unfinished == 0
        assert c.statistics == a.statistics and bytes(c.save()) == bytes(a.save())


def test_step_options(values):
    with make() as cache, cache.open() as sequence:
        grow(sequence, 200)
        k, v, q = tokens(200, 204)
        sequence.reserve(4)
        for draft in range(2):  # stored in two parts, attended after
            part = slice(2 * draft, 2 * draft + 2)
            sequence.store(0, k[:, part], v[:, part], first_draft=2 * draft)
        out = np.zeros((4, HEADS * ROWS, DIM), np.float16).transpose(1, 0, 2)
        options = kvarn.AttentionOptions(window=50, soft_cap=20.0)
        got, sums = sequence.attend(
            0,
            q,
            out=out,
            options=options,
            log_sum_exp=True,
            sink_logits=np.ones(4),
            alibi_slopes=np.full(4, 0.01),
        )
        assert got is out and sums.shape == (HEADS * ROWS, 4)
        held_k, held_v = sequence.read(0)
        expected, expected_sums = kvarn.attend(
            q,
            (held_k, held_v),
            format=FORMAT,
            window=50,
            soft_cap=20.0,
            log_sum_exp=True,
            sink_logits=np.ones(4),
            alibi_slopes=np.full(4, 0.01),
        )
        assert np.abs(expected - out).max() < 5e-3 and np.abs(expected_sums - sums).max() < 5e-3
        # A tree of drafts: 2 follows 0, not 1.
        seen = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)
        tree = sequence.attend(0, q, mask=seen)
        assert np.abs(tree - kvarn.attend(q, (held_k, held_v), format=FORMAT, mask=seen)).max() < 5e-3
        assert sequence.attend(1, None, k, v) is None
        sequence.commit(path=[0, 2, 3])
        assert len(sequence) == 203
        assert np.array_equal(sequence.read(0, 200, 203)[0], k[:, [0, 2, 3]].astype(np.float16))


def test_shift():
    with make() as cache, cache.open() as sequence:
        grow(sequence, 200)
        before = sequence.read(0)[0]
        calls = []

        def turned(keys):  # of all pairs of channels by one angle
            a, b = keys[..., : DIM // 2], keys[..., DIM // 2 :]
            return np.concatenate([a * np.cos(0.3) - b * np.sin(0.3), a * np.sin(0.3) + b * np.cos(0.3)], -1)

        def turn(layer, head, keys, position):
            calls.append((layer, head, position, len(keys)))
            keys[:] = turned(keys)

        report = sequence.shift(64, 200, 20, turn)
        after = sequence.read(0)[0]
        assert (
            (report.tokens, report.sealed_tokens) == (136, 128)
            and 0 < report.relative_error < 0.2
            and sequence.next_position == 220
            and calls
        )
        assert np.array_equal(after[:, :64], before[:, :64])
        assert np.linalg.norm(after[:, 64:] - turned(before[:, 64:])) < 0.15 * np.linalg.norm(before[:, 64:])

        def fails(*_):
            raise RuntimeError("turned the wrong way")

        with pytest.raises(RuntimeError, match="wrong way"):
            sequence.shift(213, 220, 1, fails)


def test_nothing_to_do(values):
    """No tokens, no tiles, no steps; and integers of NumPy."""
    with make() as cache, cache.open() as sequence:
        assert cache.step(np.int64(0), []) == [] and sequence.seal().sealed == 0
        sequence.reserve(np.int64(0))
        sequence.commit(np.int64(0))
        assert (
            sequence.read(np.int32(1))[0].shape == (HEADS, 0, DIM)
            and cache.load(sequence.save()).next_position == 0
        )
    nothing = values(2, 0, DIM)
    records = kvarn.quantize(FORMAT, nothing, nothing, errors=True)
    assert (
        records.tiles == 0
        and records.nbytes == 0
        and kvarn.dequantize(records, threads=2)[0].shape == (2, 0, DIM)
    )
    out, sums = kvarn.attend(values(2, 3, DIM), records, log_sum_exp=True)
    assert not out.any() and (sums == -np.inf).all()
    assert kvarn.attend(nothing, kvarn.quantize(FORMAT, values(2, 64, DIM), values(2, 64, DIM))).shape == (
        2,
        0,
        DIM,
    )


def test_an_interrupt_stops_the_threads():
    done = []

    def work(item, scratch):
        if item == 3:
            raise KeyboardInterrupt
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        _work.run(100_000, 1, 3, work)
    count = len(done)
    assert count < 100_000
    _work.run(10, 1, 3, lambda item, scratch: done.append(item))
    assert sorted(done[count:]) == list(range(10))


def test_plans():
    config = kvarn.CacheConfig(FORMAT, layers=4, heads=2, most_tokens=4096, sequences=8)
    plan = config.plan()
    assert (
        plan.bytes == plan.records + plan.exact + plan.state
        and plan.record_block_bytes == 4 * 2 * FORMAT.record_bytes
    )
    fitted = config.fit(plan.bytes // 2)
    assert 0 < fitted.record_blocks < plan.record_blocks and fitted.plan().bytes <= plan.bytes // 2
    with kvarn.Cache(config, memory_bytes=plan.bytes // 2) as cache:
        assert cache.plan == fitted.plan()
    one = config.plan_sequence(4096)
    assert one.elements == 4096 * 4 * 2 * 2 * DIM and FORMAT.bits_per_element < one.bits_per_element < 16
    ruled = kvarn.CacheConfig(
        FORMAT,
        layers=4,
        heads=2,
        rules=(
            kvarn.Rule(layers=(0, 0), key_bits=8, value_bits=8),
            kvarn.Rule(heads=(-1, -1), key_rotated=False),
        ),
    )
    assert ruled.plan().record_block_bytes > 4 * 2 * FORMAT.record_bytes
    with kvarn.Cache(ruled) as cache:
        assert cache.format(0, 0).bits == (8, 8) and cache.format(1, 0) == FORMAT
        assert cache.format(3, 1) == FORMAT.replace(key_rotated=False)
        cache.set_format(3, 1, FORMAT)
        assert cache.format(3, 1) == FORMAT


def test_bases_by_data():
    with make(layers=1) as cache, cache.open() as sequence:
        k, v, q = tokens(0, 200)
        k, q = k.copy(), q.copy()
        k[1, :, 5] *= 60
        q[2:, :, 5] = 0
        sequence.reserve(200)
        sequence.store(0, k, v)
        sequence.commit()
        moments = cache.moments()
        cache.add_query_moments(0, q, moments)
        assert moments.any() and cache.choose_bases(sequence, moments) == 1
        assert cache.format(0, 0).key_rotated and not cache.format(0, 1).key_rotated
        assert sequence.seal().sealed == 2
        with pytest.raises(kvarn.KvarnError, match="BAD_ARGUMENT"):
            cache.choose_bases(sequence, moments)


def test_tiles_that_no_record_can_hold_stay_exact():
    with make(layers=1, exact="float32") as cache, cache.open() as sequence:
        k, v, _ = tokens(0, 200)
        k = k.copy()
        k[0, 70, 3] = np.nan
        sequence.reserve(200)
        sequence.store(0, k, v)
        sequence.commit()
        report = sequence.seal()
        assert (report.sealed, report.kept_exact) == (1, 1)
        assert report.first_kept == kvarn.KeptTile(64, 0, 0, kvarn.Status.NOT_FINITE)
        assert sequence.statistics.kept_tiles == 1 and np.array_equal(
            sequence.read(0, 64, 128)[0], k[:, 64:128], equal_nan=True
        )


def test_errors():
    with make(sequences=2) as cache:
        a = cache.open()
        b = a.fork()
        with pytest.raises(kvarn.KvarnError) as error:
            cache.open()
        assert error.value.status is kvarn.Status.NO_ROOM
        b.close()
        b.close()
        with pytest.raises(kvarn.KvarnError, match="sequence") as error:
            b.reserve(1)
        assert error.value.status is kvarn.Status.STALE_HANDLE and not b.is_open and b.next_position == -1
        k, v, q = tokens(0, 4)
        with pytest.raises(kvarn.KvarnError, match="SEQUENCE_FULL"):
            a.reserve(5000)
        with pytest.raises(kvarn.KvarnError, match=r"sequences\[1\]") as error:
            cache.reserve([a, b], 4)
        assert error.value.status is kvarn.Status.STALE_HANDLE and a.drafts == 0
        with pytest.raises(ValueError, match="tokens: 2 numbers for 1"):
            cache.reserve([a], [1, 2])
        with pytest.raises(ValueError, match="another cache"):
            cache.reserve([a, make().open()], 1)
        a.reserve(4)
        with pytest.raises(kvarn.KvarnError, match="tokens") as error:
            a.commit()  # not stored
        assert error.value.argument == "tokens"
        with pytest.raises(kvarn.KvarnError, match="NOT|BAD_ARGUMENT"):
            a.attend(0, q)
        for call, words in (
            (lambda: a.attend(0, q, k[:1], v[:1]), "k: 1 heads"),
            (lambda: a.attend(0, q, k), "v: is missing"),
            (lambda: a.attend(0, q[:3], k, v), "q: 3 query heads"),
            (lambda: a.attend(0, q[..., :8], k, v), "q: 8 channels"),
            (lambda: a.attend(0, q, k, v, out=np.zeros((1, 4, DIM), np.float32)), "out: "),
            (lambda: a.commit(1, path=[0]), "path"),
            (lambda: cache.step(0, [kvarn.Step(make().open(), q, k, v)]), "sequence: is of another cache"),
        ):
            with pytest.raises(ValueError, match=words):
                call()
        with pytest.raises(kvarn.KvarnError, match="layer"):
            a.attend(LAYERS, q, k, v)
        bad = q.copy()
        bad[0, 0, 0] = np.nan
        with pytest.raises(kvarn.KvarnError, match="q: .*NOT_FINITE"):
            a.attend(0, bad, k, v, threads=2)
        for layer in range(LAYERS):
            a.store(layer, k, v)
        with pytest.raises(kvarn.KvarnError, match="drafts"):
            a.save()
        a.commit()
        with pytest.raises(kvarn.KvarnError, match="begin"):
            a.erase(3, 1)
        with pytest.raises(kvarn.KvarnError, match="position"):
            a.truncate(-1)
        saved = a.save()
        a.close()
        with make(layers=1) as other, pytest.raises(kvarn.KvarnError, match=r"source: .*\(.+\)") as error:
            other.load(saved)
        assert error.value.status is kvarn.Status.OTHER_CONFIGURATION
        damaged = bytearray(saved)
        damaged[-20] ^= 1
        for source, status in ((damaged, "CORRUPT"), (saved[:-1], "TRUNCATED"), (b"", "TRUNCATED")):
            with pytest.raises(kvarn.KvarnError) as error:
                cache.load(source)
            assert error.value.status.name == status and cache.statistics.sequences == 0

        class Broken:
            def read(self, size):
                raise OSError("the disk is gone")

            def write(self, data):
                raise OSError("the disk is full")

        with pytest.raises(OSError, match="gone"):
            cache.load(Broken())
        with cache.load(saved) as restored, pytest.raises(OSError, match="full"):
            restored.save(Broken())
        with pytest.raises(FileNotFoundError):
            cache.load("/there/is/no/such/file")
    with pytest.raises(ValueError, match="closed"):
        cache.open()
    for fields, words in (
        (dict(layers=0), "layers"),
        (dict(sink_tokens=-1), "sink_tokens"),
        (dict(key_basis="x"), "key_basis"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**fields)
    with pytest.raises(TypeError, match="format"):
        kvarn.Cache("k4v2_g128", layers=1, heads=1)
    with pytest.raises(TypeError, match="exact"):
        make(exact="float64")
    with pytest.raises(kvarn.KvarnError, match="memory_bytes"):
        make(memory_bytes=1000)
