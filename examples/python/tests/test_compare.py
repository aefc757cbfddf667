# SPDX-License-Identifier: Apache-2.0
"""compare() and huggingface.py, against the figures of the command line tool."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT

import kvarn

SCRIPT = pathlib.Path(__file__).parents[1] / "huggingface.py"

#: What `kvarn compare` printed for layer 0 of examples/data.
PRINTED = """\
kvarn/refined k4v2_g128    3.3750   55,296  0.0748   0.0001   0.0004   0.0005  0.0000  0.3228   0.0002   0.0004   0.0005  0.0000     0.3130
kvarn/refined k8v8_g128    8.3750  137,216  0.0046   0.0001   0.0004   0.0005  0.0013  0.0054   0.0002   0.0005   0.0006  0.0013     0.0063
kvarn/paper k4v2_g128      3.3750   55,296  0.0823   0.0061   0.0208   0.0226  0.0086  0.4853   0.1163   0.2327   0.2635  0.0660     0.4688
"""


def rows(text: str) -> dict[str, list[float]]:
    """Method: figures, of what both print."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if line.startswith("kvarn/") and len(words) > 3:
            found[" ".join(words[:2])] = [float(word.replace(",", "")) for word in words[2:]]
    return found


def same_figures(mine: str, theirs: str) -> None:
    ours, expected = rows(mine), rows(theirs)
    assert expected and set(expected) <= set(ours)
    for method, figures in expected.items():
        assert np.allclose(ours[method], figures, atol=1.01e-4, rtol=0), (
            method
        )  # one in the last place that is printed


def test_figures_of_the_command(activations):
    k, v, q = activations
    result = kvarn.compare(k, v, ["k4v2_g128", kvarn.Format("k8v8_g128")], q, threads=2)
    same_figures(str(result), PRINTED)
    assert str(result).startswith(
        "512 of 512 tokens, 1 head, head_dim 128 (K) and 128 (V); float16 would take 262,144 bytes\n"
        "attention: 2 query heads on 1, causal, every query\n"
    )
    assert (
        result["k4v2_g128"].encoder == "refined"
        and result["paper k4v2_g128"].v_error > result["k4v2_g128"].v_error
    )
    with pytest.raises(KeyError):
        result["k2v2_g128"]


def test_the_command_itself(activations):
    command = os.environ.get("KVARN_CLI")
    if not command:
        pytest.skip("KVARN_CLI does not name the command line tool")
    data = ROOT / "examples" / "data"
    k, v, q = (np.load(data / f"layer2_{part}.npy") for part in "kvq")
    for more, queries in (([], None), (["--q", data / "layer2_q.npy"], q)):
        printed = subprocess.run(
            [command, "compare", data / "layer2_k.npy", data / "layer2_v.npy", *more],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        mine = str(kvarn.compare(k, v, None, queries))
        same_figures(mine, printed)
        assert mine.splitlines()[0] == printed.splitlines()[0]


def test_without_queries_and_values(activations, values):
    k, v, _ = activations
    result = kvarn.compare(k, v)
    assert [method.name for method in result.methods[:2]] == [
        "k2v2_g128",
        "k3v3_g128",
    ] and "attention" not in str(result)
    latent = kvarn.compare(k, v, [kvarn.Format.of(value_bits=0, head_dim=128)], encoders=["refined"])
    assert np.isnan(latent.methods[0].v_error) and " -  " in str(latent)
    many = kvarn.compare(
        values(2, 150, 64), values(2, 150, 96, 2), ["k4v4_g32"], values(4, 150, 64, 3), query_step=7
    )
    assert (many.tokens, many.all_tokens, many.query_step) == (128, 150, 7) and "one query in 7" in str(many)


def test_errors_name_the_argument(activations):
    k, v, q = activations
    bad = v.copy()
    bad[0, 3, 3] = np.inf
    for call, words in (
        (lambda: kvarn.compare(k, bad), "v: .*finite"),
        (lambda: kvarn.compare(k[:, :100], v[:, :100]), "k: 100 tokens"),
        (lambda: kvarn.compare(k, v[:, :200]), "v: "),
        (lambda: kvarn.compare(k, v, None, q[:, :200]), "q: "),
        (lambda: kvarn.compare(k, v, ["k4v2_g128_auto"]), "q: is missing"),
        (lambda: kvarn.compare(k, v, []), "formats"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(kvarn.KvarnError, match="name"):
        kvarn.compare(k, v, ["q4_0"])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_script_with_files():
    files = [str(ROOT / "examples" / "data" / f"layer0_{part}.npy") for part in "kvq"]
    done = run("--npy", *files, "--formats", "k4v2_g128", "k8v8_g128", "--encoders", "refined", "paper")
    assert done.returncode == 0, done.stderr
    same_figures(done.stdout, PRINTED)
    done = run("--npy", *files[:2], "--formats", "k4v2")
    assert done.returncode == 1 and done.stderr.startswith("huggingface.py: ") and "name" in done.stderr


def test_script_reads_every_kind_of_past_key_values(values):
    spec = importlib.util.spec_from_file_location("huggingface", SCRIPT)
    huggingface = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(huggingface)
    k, v = values(4, 10, 8).reshape(2, 2, 10, 8), values(4, 10, 8, 2).reshape(2, 2, 10, 8)
    layer = types.SimpleNamespace(keys=k, values=v)
    for past in (
        ((k, v), (k, v)),
        [(k, v, k, v)] * 2,
        types.SimpleNamespace(key_cache=[k, k], value_cache=[v, v]),
        types.SimpleNamespace(layers=[layer, layer]),
    ):
        pairs = huggingface.layers_of(past, sequence=1)
        assert len(pairs) == 2
        for got_k, got_v in pairs:
            assert got_k.ctypes.data == k[1].ctypes.data and got_v.ctypes.data == v[1].ctypes.data
    for past, words in (((), "no layers"), ([(k[0], v[0])], "layer 0")):
        with pytest.raises(ValueError, match=words):
            huggingface.layers_of(past)


def test_script_records_queries():
    spec = importlib.util.spec_from_file_location("huggingface", SCRIPT)
    huggingface = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(huggingface)

    module = types.ModuleType("modeling_something")
    module.apply_rotary_pos_emb = original = lambda q, k, cos, sin: (q + 1, k + 1)
    module.Model = type("Model", (), {"__module__": "modeling_something"})
    sys.modules["modeling_something"] = module
    try:
        with huggingface.recorded_queries(module.Model()) as queries:
            assert module.apply_rotary_pos_emb(1, 2, 3, 4) == (2, 3) and queries == [2]
        assert module.apply_rotary_pos_emb is original
        del module.apply_rotary_pos_emb
        with huggingface.recorded_queries(module.Model()) as queries:
            assert queries == []
    finally:
        del sys.modules["modeling_something"]
