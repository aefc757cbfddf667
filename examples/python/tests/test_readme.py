# SPDX-License-Identifier: Apache-2.0
"""The programs of README.md run, and print what it says."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import ROOT

import kvarn

README = (ROOT / "examples" / "python" / "README.md").read_text(encoding="utf-8")


def test_programs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    programs = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(programs) == 3
    names: dict = {}
    exec(programs[0], names)
    assert f"```\n{capsys.readouterr().out}```" in README
    for program in programs[1:]:
        exec(program, names)
    assert np.abs(names["out"]).max() > 0 and names["k_held"].shape == (1, 450, 128)


def test_quick_start(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    (program,) = [p for p in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import kvarn" in p]
    names: dict = {}
    exec(program, names)
    assert names["out"].shape == (2, 512, 128) and "tokens=300" in capsys.readouterr().out


def test_errors():
    k = np.zeros((2, 500, 128), np.float32)
    with pytest.raises(ValueError) as error:
        kvarn.quantize(kvarn.Format(), k, k)
    assert f"ValueError: {error.value}\n" in README
    v = k.copy()
    v[1, 130, 0] = np.nan
    with pytest.raises(kvarn.KvarnError) as error:
        kvarn.quantize(kvarn.Format(), k[:, :256], v[:, :256])
    assert f"{type(error.value).__module__}.KvarnError: {error.value}\n" in README
