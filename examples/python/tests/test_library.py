# SPDX-License-Identifier: Apache-2.0
"""Loading, structs, statuses, formats."""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import kvarn
from kvarn import _c


def test_structs_are_those_of_the_header():
    """Every offset and size of tests/c/layout_64.txt, which a test in C holds."""
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        pytest.skip("layout_64.txt is of 64-bit machines")
    seen = {}
    for line in (ROOT / "tests" / "c" / "layout_64.txt").read_text().splitlines():
        struct, field, *numbers = line.split()
        if struct not in _c.STRUCTS:
            continue
        mine = _c.STRUCTS[struct]
        if field == "-":
            assert ctypes.sizeof(mine) == int(numbers[0]), struct
        else:
            place = getattr(mine, field)
            assert [place.offset, place.size] == [int(n) for n in numbers], f"{struct}.{field}"
            seen.setdefault(struct, []).append(field)
    assert set(seen) == set(_c.STRUCTS)
    for struct, fields in seen.items():
        assert fields == [name for name, *_ in _c.STRUCTS[struct]._fields_], struct


def test_defaults_are_those_of_the_header():
    text = (ROOT / "include" / "kvarn" / "c" / "kvarn.h").read_text()
    for name in ("encode_options", "choose_options", "bit_rule", "layer_options", "attention_options"):
        init = (
            text.split(f"#define KVARN_{name.upper()}_INIT")[1].split("}")[0].split("{")[1].replace("\\", "")
        )
        numbers = [item.strip() for item in init.split(",")]
        struct = _c.STRUCTS["kvarn_" + name]()
        known = {
            "NULL": None,
            "KVARN_ENCODER_REFINED": 1,
            "KVARN_BASIS_ORIGINAL": 0,
            "KVARN_PRECISION_FINE": 1,
        }
        for (field, *_), item in zip(struct._fields_[1:], numbers[1:]):
            expected = known[item] if item in known else float(item.rstrip("f"))
            found = getattr(struct, field)
            assert (bool(found) is False) if expected is None else found == pytest.approx(expected), (
                f"{name}.{field}"
            )
        assert len(struct._fields_) == len(numbers)


def test_statuses_are_those_of_the_header():
    text = (
        (ROOT / "include" / "kvarn" / "c" / "kvarn.h")
        .read_text()
        .split("typedef enum kvarn_status {")[1]
        .split("}")[0]
    )
    header = dict(
        (line.split("=")[0].strip().removeprefix("KVARN_"), int(line.split("=")[1].split(",")[0]))
        for line in text.splitlines()
        if "=" in line and "STATUS_IS_INT" not in line
    )
    assert header == {status.name: status.value for status in kvarn.Status}
    assert (
        kvarn.Status(77) == 77 and kvarn.Status(77).name == "STATUS_77"
    )  # one that a newer library may have


def test_functions_are_in_the_header():
    text = (ROOT / "include" / "kvarn" / "c" / "kvarn.h").read_text()
    for name, kinds in _c.FUNCTIONS.items():
        declaration = text.split(f"kvarn_{name}(")[1].split(")")[0]
        parameters = [] if declaration.strip() == "void" else declaration.split(",")
        given = kinds.partition(" ")[2]
        assert len(parameters) == len(given), name
        for parameter, kind in zip(parameters, given):
            base = parameter.split()
            expected = (
                "t"
                if "char*" in parameter and "**" not in parameter
                else "p"
                if "*" in parameter
                else {
                    "size_t": "z",
                    "int32_t": "i",
                    "int64_t": "q",
                    "uint64_t": "Q",
                    "double": "d",
                    "kvarn_sequence": "S",
                    "kvarn_status": "i",
                    "kvarn_write": "p",
                    "kvarn_read_some": "p",
                    "kvarn_turn": "p",
                }[base[0]]
            )
            assert kind == expected, f"{name}: {parameter.strip()}"


def test_a_library_that_is_not_one(tmp_path):
    for named, words in (
        (tmp_path / "none.so", "names no file"),
        (ROOT / "README.md", "not a library of kvarn"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", "import kvarn"],
            env={**os.environ, "KVARN_LIBRARY": str(named)},
            capture_output=True,
            text=True,
        )
        assert run.returncode != 0 and "ImportError" in run.stderr and words in run.stderr


def test_instruction_sets():
    before = kvarn.active_arch()
    assert before in kvarn.usable_archs()
    with pytest.raises(kvarn.KvarnError, match="name") as error:
        kvarn.select_arch("abacus")
    assert error.value.status is kvarn.Status.BAD_ARGUMENT
    kvarn.select_arch(before)
    assert kvarn.active_arch() == before and kvarn.__version__.count(".") == 2


def test_format():
    f = kvarn.Format("k4v2_g128", head_dim=128)
    assert (f.bits, f.group, f.head_dim_k, f.head_dim_v, f.key_channels) == ((4, 2), 128, 128, 128, 128)
    assert f.record_bytes == 13824 and f.bits_per_element == 3.375 and f.layout["v_codes"] == 8960
    assert f == kvarn.Format.of() and hash(f) == hash(kvarn.Format()) and f != f.replace(key_bits=3)
    assert pickle.loads(pickle.dumps(f)) == f and eval(repr(f), {"Format": kvarn.Format}) == f
    ko = kvarn.Format("kvarn_k3v2_g64_ko", 96, head_dim_v=64, exact_channels=64)
    assert (ko.name, ko.key_rotated, ko.value_rotated, ko.key_channels, ko.head_dim_v) == (
        "k3v2_g64_ko",
        False,
        True,
        160,
        64,
    )
    latent = kvarn.Format.of(key_bits=4, value_bits=0, head_dim=512, exact_channels=64)
    assert not latent.has_values and latent.head_dim_v == 512
    assert f.within(2.5).name == "k2v2_g128"


def test_support():
    f = kvarn.Format("k4v2_g128", head_dim=128)
    found = f.support("attend", "fast")
    assert found.arch == kvarn.active_arch() and found.fixed_bounds and found.value_precision == "fast"
    assert kvarn.Format("k4v6_g128").support(precision="fast").value_precision == "fine"
    assert f.support("seal").time >= 0 and kvarn.supports("k4v2_g128", 100) is None
    assert not kvarn.supports("k4v2_g128_kovo", 100, operation="dequantize").fixed_bounds
    with pytest.raises(ValueError, match="operation"):
        f.support("sell")
    with pytest.raises(ValueError, match="precision"):
        f.support(precision="best")


@pytest.mark.parametrize(
    "arguments, argument, status",
    [
        (("k4v2", 128), "name", "BAD_FORMAT_NAME"),
        (("k4v2_g128", 44), "head_dim", "UNSUPPORTED_HEAD_DIM"),
        (("k7v2_g128", 128), "bits", "UNSUPPORTED_BITS"),
        (("k4v2_g100", 128), "group", "UNSUPPORTED_GROUP"),
    ],
)
def test_format_errors(arguments, argument, status):
    with pytest.raises(kvarn.KvarnError, match=argument) as error:
        kvarn.Format(*arguments)
    assert error.value.argument == argument and error.value.status.name == status
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.status is error.value.status


def test_more_format_errors():
    with pytest.raises(kvarn.KvarnError, match="exact_channels"):
        kvarn.Format(exact_channels=3)
    with pytest.raises(kvarn.KvarnError, match="bits"):
        kvarn.Format().within(1.0)


def test_integers_of_numpy_and_ones_that_do_not_fit():
    assert kvarn.Format("k4v2_g128", np.int64(64)) == kvarn.Format("k4v2_g128", 64)
    for call in (
        lambda: kvarn.Format("k4v2_g128", 2**32 + 128),
        lambda: kvarn.Format(exact_channels=2**32),
        lambda: kvarn.Encoding(iterations=2**32 + 8)._make(),
        lambda: kvarn.CacheConfig(kvarn.Format(), layers=2**32 + 1, heads=1).plan(),
    ):
        with pytest.raises(ValueError, match="out of range"):
            call()
