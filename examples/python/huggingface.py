#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What each format loses on K and V of a Hugging Face model: the table of `kvarn compare`, per layer.

    python huggingface.py --model HuggingFaceTB/SmolLM2-135M --text book.txt --tokens 1024
    python huggingface.py --npy k.npy v.npy q.npy

The first needs torch and transformers, the second neither. Queries are not in `past_key_values`; they are
recorded where the model's module has a function `apply_rotary_pos_emb` (Llama, Mistral, Qwen, Gemma, Phi and
many others), and otherwise the errors of attention and the formats that end in _auto are left out.

In a notebook: `layers_of(model(**inputs, use_cache=True).past_key_values)` gives K and V of each layer, as
views.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import kvarn


def layers_of(past_key_values: Any, sequence: int = 0) -> list[tuple[Any, Any]]:
    """K and V [KV heads, tokens, head_dim] of each layer, for one sequence of the batch: views of the model's
    own tensors. Takes a DynamicCache of any version, or tuples (k, v, ...).
    """
    if hasattr(past_key_values, "layers"):  # transformers from 4.54 on
        pairs = [(layer.keys, layer.values) for layer in past_key_values.layers]
    elif hasattr(past_key_values, "key_cache"):
        pairs = list(zip(past_key_values.key_cache, past_key_values.value_cache))
    else:
        pairs = [(layer[0], layer[1]) for layer in past_key_values]
    if not pairs:
        raise ValueError("past_key_values: has no layers (was the model called with use_cache=True?)")
    for number, (k, v) in enumerate(pairs):
        if k is None or v is None or len(k.shape) != 4 or len(v.shape) != 4:
            raise ValueError(f"past_key_values: layer {number} is not [batch, heads, tokens, head_dim]")
    return [(k[sequence], v[sequence]) for k, v in pairs]


@contextlib.contextmanager
def recorded_queries(model: Any) -> Iterator[list[Any]]:
    """The queries of each layer, behind the rotary embedding, [batch, query heads, tokens, head_dim], while
    it is open.
    """
    module = sys.modules[type(model).__module__]
    queries: list[Any] = []
    original = getattr(module, "apply_rotary_pos_emb", None)
    if original is None:
        yield queries
        return

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        queries.append(result[0])
        return result

    setattr(module, "apply_rotary_pos_emb", recording)
    try:
        yield queries
    finally:
        setattr(module, "apply_rotary_pos_emb", original)


def run_model(name: str, text: str, tokens: int) -> list[tuple[Any, Any, Any]]:
    """K, V and queries (or None) of each layer after one pass over the text."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(
            f"huggingface.py: {error}. --model needs torch and transformers; --npy needs neither"
        ) from error
    folder = pathlib.Path(name)
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json")
        )  # nothing to guess by
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name).float().eval()
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)
    found = inputs["input_ids"].shape[1]
    print(
        f"{name}: {found} tokens, transformers {transformers.__version__}, torch {torch.__version__}",
        flush=True,
    )
    with torch.no_grad(), recorded_queries(model) as queries:
        pairs = layers_of(model(**inputs, use_cache=True).past_key_values)
    if len(queries) != len(pairs):
        if queries:
            print(f"queries were seen {len(queries)} times in {len(pairs)} layers: left out")
        return [(k, v, None) for k, v in pairs]
    return [(k, v, q[0]) for (k, v), q in zip(pairs, queries)]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a name on the hub, or a folder")
    source.add_argument(
        "--npy", nargs="+", metavar="FILE", help="K, V and, if there, Q: [heads, tokens, head_dim]"
    )
    parser.add_argument(
        "--text",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("README.md"),
        help="what the model reads (default: the README beside this script)",
    )
    parser.add_argument("--tokens", type=int, default=512, help="of the text (default: %(default)s)")
    parser.add_argument(
        "--formats",
        nargs="+",
        help="for example k4v2_g128 k4v2_g128_auto (default: those of `kvarn compare`)",
    )
    parser.add_argument("--encoders", nargs="+", default=["refined"], choices=["refined", "paper"])
    parser.add_argument("--layers", nargs="+", type=int, help="only these (default: all)")
    parser.add_argument("--summary", action="store_true", help="only the summary over layers")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    if options.npy:
        if len(options.npy) not in (2, 3):
            parser.error("--npy: K V, or K V Q")
        arrays = [np.load(file) for file in options.npy]
        layers = [(arrays[0], arrays[1], arrays[2] if len(arrays) == 3 else None)]
    else:
        layers = run_model(options.model, options.text.read_text(encoding="utf-8"), options.tokens)

    results = []
    for number in options.layers if options.layers is not None else range(len(layers)):
        if not 0 <= number < len(layers):
            parser.error(f"--layers: there are {len(layers)}, 0 to {len(layers) - 1}")
        k, v, q = layers[number]
        result = kvarn.compare(k, v, options.formats, q, encoders=options.encoders, threads=options.threads)
        results.append(result)
        if not options.summary:
            print(f"\nlayer {number}: {result}", flush=True)
    if len(results) > 1:
        print(f"\nover {len(results)} layers: mean and worst relative error\n")
        print(
            f"{'method':28}  {'bits':>6}  {'K mean':>7}  {'worst':>7}  "
            f"{'V mean':>7}  {'worst':>7}  {'attention':>9}  {'worst':>7}"
        )
        for methods in zip(*(result.methods for result in results)):
            first = methods[0]
            row = f"{'kvarn/' + first.encoder + ' ' + first.name:28}  {first.bits_per_element:6.3f}"
            for name, width in (("k_error", 7), ("v_error", 7), ("attention_error", 9)):
                errors = np.array([getattr(method, name) for method in methods])
                row += "  " + (
                    "-".rjust(width) + "  " + "-".rjust(7)
                    if np.isnan(errors).any()
                    else f"{errors.mean():{width}.4f}  {errors.max():7.4f}"
                )
            print(row)


if __name__ == "__main__":
    try:
        main()
    except (kvarn.KvarnError, OSError, ValueError) as error:
        raise SystemExit(f"huggingface.py: {error}") from error
