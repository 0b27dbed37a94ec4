"""GGUF files: what the writer of the gguf package makes of a model, read back."""

import json
import os
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import _type_traits

from ftjax import gguf, hf, hf_export, models, weights
from ftjax.errors import UserError

ASSETS = Path(os.environ.get("FTJAX_TEST_ASSETS", "no assets"))
TINY = Path(__file__).parent / "assets" / "tiny_tokenizer"
SMOLLM2 = os.environ.get("FTJAX_TEST_SMOLLM2", "")
D, F, V, L, N, K = 64, 96, 416, 2, 4, 2
TEXT = (
    "Hello  wörld, don't 12345!\n\n\tx = 3.14 // 漢字 😀😀 <|im_start|>user\nI'LL hé<|im_end|> \u00a0 end  "
)
OURS = {  # the file's names of one layer's tensors, as llama.cpp defines them
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def config(arch, **changes):
    return dict(
        model_type=arch,
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        rms_norm_eps=3e-5,
        rope_theta=12345.0,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        head_dim=D // N,
        **changes,
    )


def metadata_of(folder: Path) -> dict:
    """tokenizer.ggml.* of a tokenizer.json, as llama.cpp's converter writes it."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = dict(raw["model"]["vocab"])
    added = {t["content"]: t for t in raw["added_tokens"]}
    vocab |= {content: t["id"] for content, t in added.items()}
    tokens = [f"[PAD{i}]" for i in range(max(vocab.values()) + 3)]  # converters pad to the embedding's rows
    types = [gguf.UNUSED] * len(tokens)
    for token, i in vocab.items():
        tokens[i] = token
        types[i] = gguf.NORMAL
        if token in added:
            types[i] = gguf.CONTROL if added[token]["special"] else gguf.USER_DEFINED
        elif raw["model"].get("byte_fallback") and token.startswith("<0x"):
            types[i] = gguf.BYTE
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    out = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if raw["model"].get("byte_fallback"):
        types[vocab["<unk>"]] = gguf.UNKNOWN
        out["tokenizer.ggml.model"] = "llama"
        out["tokenizer.ggml.scores"] = scores(folder, len(tokens))
    else:
        out |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges}
    return out


def scores(folder: Path, count: int) -> list[float]:
    """Of the pieces in a SentencePiece model: field 2 of each message in field 1 (protobuf's wire format)."""
    raw, at, out = (folder / "tokenizer.model").read_bytes(), 0, []
    while at < len(raw) and raw[at] == 0x0A and len(out) < count:
        size, at = raw[at + 1], at + 2
        if size & 0x80:
            size, at = (size & 0x7F) | raw[at] << 7, at + 1
        text = raw[at + 1]
        assert raw[at] == 0x0A and raw[at + 2 + text] == 0x15
        out.append(struct.unpack("<f", raw[at + 3 + text : at + 7 + text])[0])
        at += size
    return out + [0.0] * (count - len(out))


def write(path: Path, arch: str, tensors, *, kind="F32", more=(), tokenizer=True, rope_freqs=None, **facts):
    """A GGUF of HF `tensors`, matrices in quantisation `kind`, laid out as llama.cpp's converter does."""
    w = GGUFWriter(path, arch)
    w.add_context_length(128)
    w.add_embedding_length(D)
    w.add_feed_forward_length(F)
    w.add_block_count(L)
    w.add_head_count(N)
    w.add_head_count_kv(K)
    w.add_rope_freq_base(12345.0)
    w.add_layer_norm_rms_eps(3e-5)
    w.add_rope_dimension_count(D // N)
    for key, value in facts.items():
        w.add_float32(key.replace("__", "."), value) if isinstance(value, float) else w.add_string(
            key.replace("__", "."), value
        )
    if tokenizer:
        meta = metadata_of(TINY)
        w.add_tokenizer_model(meta["tokenizer.ggml.model"])
        w.add_tokenizer_pre("smollm")
        w.add_token_list(meta["tokenizer.ggml.tokens"])
        w.add_token_types(meta["tokenizer.ggml.token_type"])
        w.add_token_merges(meta["tokenizer.ggml.merges"])
        w.add_eos_token_id(meta["tokenizer.ggml.tokens"].index("<|im_end|>"))
        w.add_eot_token_id(meta["tokenizer.ggml.tokens"].index("<|endoftext|>"))
        w.add_chat_template("{{ messages }}")
    back = {v: k for k, v in OURS.items()} | {v: k for k, v in NAMES.items()}
    for name, x in tensors.items():
        stem, suffix = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            layer, rest = stem.removeprefix("model.layers.").split(".", 1)
            ours = f"blk.{layer}.{back[rest]}.{suffix}"
        else:
            rest, ours = stem, f"{back[stem]}.{suffix}"
        if arch == "llama" and rest.endswith(("q_proj", "k_proj")):
            heads = N if rest.endswith("q_proj") else K
            x = x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if x.ndim == 1 or kind == "F32":
            w.add_tensor(ours, x)
        else:
            type_ = GGMLQuantizationType[kind]
            w.add_tensor(ours, quantize(x, type_), raw_dtype=type_)
    if rope_freqs is not None:
        w.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name, x, type_ in more:
        w.add_tensor(name, x, raw_dtype=type_)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def random_tensors(arch, **changes):
    model = models.from_config(config(arch, **changes))
    params = weights.init(jax.random.key(3), model.table)
    params = jax.tree.map(lambda x: x + 0.1, params)
    flat = weights.flatten(params)
    return {n: x for path in flat for n, x in weights.to_hf(model.table, path, flat[path]).items()}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_reads_back_what_was_written(arch, kind, tmp_path):
    tensors = random_tensors(arch)
    source = hf.open_model(write(tmp_path / "m.gguf", arch, tensors, kind=kind))
    assert source.kind == "gguf" and source.config == source.config | config(arch)
    assert set(source.names()) == set(tensors)
    for name, x in tensors.items():
        wanted = x
        if kind != "F32" and x.ndim > 1:
            type_ = GGMLQuantizationType[kind]
            wanted = dequantize(quantize(x, type_), type_).reshape(
                x.shape
            )  # rows keep their blocks when permuted
        np.testing.assert_array_equal(source.get(name), wanted, err_msg=name)
    assert source.generation_config["eos_token_id"] == [source.metadata["tokenizer.ggml.eos_token_id"], 0]


def test_logits_equal_transformers_on_the_exported_base(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path / "m.gguf", "llama", random_tensors("llama", attention_bias=True), kind="Q8_0")
    source = hf.open_model(path)
    model = models.from_config(source.config)
    assert source.config["attention_bias"]
    params = hf.load_params(source, model)
    saved = hf_export.save_model(
        tmp_path / "base", model, None, source, dtype=np.float32, check=hf_export.probe(model, params)
    )
    assert saved.drift.max_logit == 0
    tokens = np.arange(20, dtype=np.int32)[None] * 7 % V
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = reference(torch.tensor(tokens).long()).logits.detach().numpy()
    np.testing.assert_allclose(model.logits(params, tokens), theirs, atol=1e-5 * np.abs(theirs).max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.encode(TEXT) == hf.load_tokenizer(source).encode(TEXT)
    assert tokenizer.chat_template == "{{ messages }}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales may be infinite
def test_every_type_that_gguf_dequantises(tmp_path):
    """Random blocks of each type; 256 is the longest block."""
    rng = np.random.default_rng(0)
    for type_ in _type_traits:
        block, size = GGML_QUANT_SIZES[type_]
        raw = rng.integers(0, 256, (V, 256 // block * size), np.uint8)
        path = tmp_path / f"{type_.name}.gguf"
        w = GGUFWriter(path, "qwen2")
        for add, value in (
            (w.add_context_length, 128),
            (w.add_embedding_length, 256),
            (w.add_feed_forward_length, 256),
            (w.add_block_count, 1),
            (w.add_head_count, 4),
            (w.add_layer_norm_rms_eps, 1e-6),
        ):
            add(value)
        w.add_tensor("token_embd.weight", raw, raw_dtype=type_)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        source = hf.open_model(path)
        got, wanted = source.get("model.embed_tokens.weight"), dequantize(raw, type_)
        assert got.shape == (V, 256) and got.dtype == np.float32
        np.testing.assert_array_equal(got, wanted, err_msg=type_.name)


def test_rope_scaling(tmp_path):
    tensors = random_tensors("llama")
    rule = dict(
        rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    divisors = gguf._llama3_divisors(rule, 12345.0, D // N)
    assert divisors.min() == 1.0 and divisors.max() == 32.0
    scaled = hf.open_model(write(tmp_path / "3.gguf", "llama", tensors, rope_freqs=divisors))
    assert scaled.config["rope_scaling"] == rule
    # the divisors are those that the forward pass uses
    from ftjax.ops import rope_frequencies

    plain, _ = rope_frequencies(dict(rope_theta=12345.0), D // N)
    ours, _ = rope_frequencies(rule | dict(rope_theta=12345.0), D // N)
    np.testing.assert_allclose(plain / ours, divisors, rtol=1e-5)
    with pytest.raises(UserError, match="not Llama 3's scaling"):
        hf.open_model(write(tmp_path / "x.gguf", "llama", tensors, rope_freqs=divisors**2))
    facts = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    linear = hf.open_model(write(tmp_path / "l.gguf", "llama", tensors, **facts))
    assert linear.config["rope_scaling"] == dict(rope_type="linear", factor=4.0)
    with pytest.raises(UserError, match="'yarn' is not supported; supported: none, linear, llama3"):
        hf.open_model(write(tmp_path / "y.gguf", "llama", tensors, llama__rope__scaling__type="yarn"))


@pytest.mark.parametrize("name, pre", [("llama3_1", "llama-bpe"), ("qwen3", "qwen2"), ("mistral_v3", None)])
def test_real_tokenizers_survive(name, pre):
    import tokenizers

    folder = ASSETS / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("FTJAX_TEST_ASSETS has no tokenizers")
    metadata = metadata_of(folder) | ({"tokenizer.ggml.pre": pre} if pre else {})
    ours = gguf.build_tokenizer(metadata, Path("x.gguf"))
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [
        TEXT,
        "The licence, 1000 times: naïve Ünïcode; 3rd\r\n\r\n'S a test.  ",
        "日本語のテキスト",
        "  a",
    ]
    readme = Path(gguf.__file__).read_text()
    for text in [*texts, readme]:
        a, b = (t.encode(text, add_special_tokens=False) for t in (ours, theirs))
        assert a.ids == b.ids
        assert ours.decode(a.ids) == theirs.decode(b.ids)


def test_tokenizer_of_a_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = hf.open_model(write(tmp_path / "m.gguf", "llama", random_tensors("llama"), tokenizer=True))
    ours, theirs = hf.load_tokenizer(source), transformers.AutoTokenizer.from_pretrained(TINY)
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.eos_token == "<|im_end|>" and ours.chat_template == "{{ messages }}"
    assert [ours.convert_ids_to_tokens(i) for i in (0, 5)] == [
        theirs.convert_ids_to_tokens(i) for i in (0, 5)
    ]
    assert len(ours) == len(theirs)  # padding tokens are not tokens


def test_errors(tmp_path):
    path = write(tmp_path / "m.gguf", "llama", random_tensors("llama"))
    whole = path.read_bytes()
    for size, said in (
        (len(whole) - 100, "truncated: .* download was not complete"),
        (300, "truncated or damaged"),
    ):
        (tmp_path / "t.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=said):
            hf.open_model(tmp_path / "t.gguf")
    (tmp_path / "n.gguf").write_bytes(b"PK" + whole[2:])
    with pytest.raises(UserError, match="not a GGUF file"):
        hf.open_model(tmp_path / "n.gguf")
    with pytest.raises(UserError, match="'gemma3' is not supported; supported: llama, qwen2, qwen3"):
        hf.open_model(write(tmp_path / "g.gguf", "gemma3", {}))
    extra = ("blk.0.ffn_exps.weight", np.zeros((4, 4), np.float32), None)
    source = hf.open_model(write(tmp_path / "e.gguf", "llama", random_tensors("llama"), more=[extra]))
    with pytest.raises(UserError, match="1 tensors in the weights .* does not have: blk.0.ffn_exps.weight"):
        hf.load_params(source, models.from_config(source.config))
    metadata = metadata_of(TINY)
    with pytest.raises(UserError, match="pre-tokenizer 'new' .* supported: .*qwen2"):
        gguf.build_tokenizer(metadata | {"tokenizer.ggml.pre": "new"}, path)
    with pytest.raises(UserError, match="tokenizer model 'bert' is not supported; supported: gpt2, llama"):
        gguf.build_tokenizer(metadata | {"tokenizer.ggml.model": "bert"}, path)


def test_a_folder_with_one_gguf_is_that_file(tmp_path):
    path = write(tmp_path / "m.gguf", "llama", random_tensors("llama"))
    assert hf.open_model(tmp_path).path == path
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="2 .gguf files, name one of them: m.gguf, other.gguf"):
        hf.open_model(tmp_path)


@pytest.mark.skipif(not Path(SMOLLM2).is_file(), reason="FTJAX_TEST_SMOLLM2 names no GGUF file")
def test_smollm2(tmp_path):
    """The real file: transformers on the exported base gives our logits, and it answers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers")
    source = hf.open_model(SMOLLM2)
    model = models.from_config(source.config)
    params = hf.load_params(source, model)
    hf_export.save_model(tmp_path / "base", model, None, source, dtype=np.float32, max_shard_bytes=2 * 10**8)
    assert len(list((tmp_path / "base").glob("model-0000?-of-00003.safetensors"))) == 3
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ours, theirs = hf.load_tokenizer(source), transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    assert ours.encode(TEXT) == theirs.encode(TEXT) and ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.tokenize("a12")[-2:] == ["1", "2"]  # digits one by one
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = np.array([ours.encode(text)], np.int32)
    with torch.no_grad():
        logits = reference(torch.tensor(tokens).long()).logits.numpy()
    close = 1e-5 * np.abs(logits).max()
    np.testing.assert_allclose(jax.jit(model.logits)(params, tokens), logits, rtol=0, atol=close)
    out = reference.generate(torch.tensor(tokens).long(), max_new_tokens=8, do_sample=False)
    assert "Paris" in ours.decode(out[0, tokens.shape[1] :])
