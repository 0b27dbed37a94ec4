"""GGUF files read as Hugging Face checkpoints: config.json, tensors and tokenizer made from their metadata.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantised blocks are decoded by the
`gguf` package, whose name map also gives each tensor its Hugging Face name. Only the file's head is parsed
on opening.
"""

import dataclasses
import functools
import hashlib
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ftjax import models
from ftjax.errors import UserError

ARCHITECTURES = {  # general.architecture -> (model_type, class); Mistral's files say "llama"
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

# How text is cut before byte-level BPE, by tokenizer.ggml.pre. None is GPT-2's own regular expression.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARKS = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    """Words cut where lower case becomes upper case, as in "camelCase"."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{ending}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{ending}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    split: str | None = None
    digits: bool = False  # each digit on its own, before anything else
    nfc: bool = False
    ignore_merges: bool = False  # a piece in the vocabulary is a token, whatever the merges say


PRE_TOKENIZERS = (  # of equal ones, the first is the one that export writes
    dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "jais", "exaone4", "phi-2", "default"), PreTokenizer())
    | dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        PreTokenizer(digits=True),
    )
    | dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
        PreTokenizer(_WORDS % "{1,3}", ignore_merges=True),
    )
    | dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer(_WORDS % "{1,3}"))
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), PreTokenizer(_WORDS % "", nfc=True))
    | {"stablelm2": PreTokenizer(_WORDS % "")}
    | {"qwen35": PreTokenizer(_MARKS, nfc=True)}
    | {"tekken": PreTokenizer(_cased("", ""), ignore_merges=True)}
    | dict.fromkeys(("gpt-4o", "llama4", "kanana2"), PreTokenizer(_cased(_CONTRACTION + "?", "{1,3}")))
)


class _Head:
    """Reads a GGUF's head: little-endian values one after another."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def scalar(self, kind: str):
        value = struct.unpack_from("<" + kind, self.data, self.at)[0]
        self.at += struct.calcsize("<" + kind)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if length > len(self.data) - self.at:
            raise struct.error("a string beyond the end")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int):
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise struct.error(f"a value of unknown type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item not in SCALARS:
            return [self.value(item) for _ in range(count)]
        dtype = np.dtype("<" + SCALARS[item].replace("q", "i8").replace("Q", "u8"))
        out = np.frombuffer(self.data, dtype, count, self.at)
        self.at += out.nbytes
        return out.tolist()


class GgufFile:
    """A .gguf file as a source of config, weights (dequantised, float32) and tokenizer. See hf.Source."""

    kind = "gguf"

    def __init__(self, path: Path, source: str):
        self.path, self.source, self.revision = path, source, None
        with open(path, "rb") as f:
            if f.read(4) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file")
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        head = _Head(self._map, path)
        head.at = 4
        try:
            version, tensors, pairs = head.scalar("I"), head.scalar("Q"), head.scalar("Q")
            if version not in (2, 3):
                raise UserError(
                    f"{path}: GGUF version {version} is not supported; supported: 2, 3 (little-endian)"
                )
            self.metadata: dict[str, Any] = {}
            for _ in range(pairs):
                key = head.string()
                self.metadata[key] = head.value(head.scalar("I"))
            self._tensors = {}
            for _ in range(tensors):
                name = head.string()
                shape = tuple(head.scalar("Q") for _ in range(head.scalar("I")))[::-1]
                self._tensors[name] = (shape, head.scalar("I"), head.scalar("Q"))
        except (struct.error, ValueError, MemoryError, OverflowError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f"{path}: truncated or damaged GGUF file: {e}") from None
        align = self.metadata.get("general.alignment", 32)
        self._start = -(-head.at // align) * align
        self._check()
        self.config = self._config()

    def _check(self) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.metadata.get("split.count", 1) > 1:
            raise UserError(
                f"{self.path}: one part of a split GGUF: join the parts with `gguf-split --merge`"
            )
        known = {int(kind) for kind in GGMLQuantizationType}
        for name, (shape, kind, offset) in self._tensors.items():
            if kind not in known:
                raise UserError(
                    f"{self.path}: {name} has a quantisation type, {kind}, that the gguf package lacks"
                )
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            end = self._start + offset + math.prod(shape) // block * size
            if end > len(self._map):
                raise UserError(
                    f"{self.path}: truncated: {len(self._map)} bytes, {name} ends at {end}: the download "
                    "was not complete"
                )

    def _config(self) -> dict[str, Any]:
        """The config.json that this file's metadata amounts to."""
        arch = self.metadata.get("general.architecture")
        if arch not in ARCHITECTURES:
            raise UserError(
                f"{self.path}: architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        model_type, architecture = ARCHITECTURES[arch]

        def get(key, default=None):
            value = self.metadata.get(f"{arch}.{key}", default)
            if value is None:
                raise UserError(f"{self.path}: the metadata has no {arch}.{key}")
            if isinstance(value, list):
                raise UserError(f"{self.path}: {arch}.{key} differs between layers, which is not supported")
            return _shortest(value)

        heads, width = get("attention.head_count"), get("embedding_length")
        head_dim = get("attention.key_length", width // heads)
        if get("rope.dimension_count", head_dim) != head_dim:
            raise UserError(f"{self.path}: rotary embedding on part of a head is not supported")
        config = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": "silu",
            "hidden_size": width,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "rope_theta": float(get("rope.freq_base", 10000.0)),
            "vocab_size": self._shape("token_embd.weight")[0],
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": "bfloat16",
        }
        if model_type != "qwen2":
            config["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        for name in ("bos", "eos", "pad"):
            key = "tokenizer.ggml." + {"pad": "padding"}.get(name, name) + "_token_id"
            if key in self.metadata:
                config[name + "_token_id"] = self.metadata[key]
        scaling = self._rope_scaling(arch, config)
        return config | ({"rope_scaling": scaling} if scaling else {})

    def _rope_scaling(self, arch: str, config: dict) -> dict | None:
        kind = self.metadata.get(f"{arch}.rope.scaling.type", "none")
        factor = self.metadata.get(
            f"{arch}.rope.scaling.factor", self.metadata.get(f"{arch}.rope.scale_linear", 1.0)
        )
        if kind not in ("none", "linear"):
            raise UserError(
                f"{self.path}: rope scaling {kind!r} is not supported; supported: none, linear, llama3"
            )
        if "rope_freqs.weight" not in self._tensors:
            return None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": _shortest(factor)}
        # Llama 3.1 and later: the file has only the divisor of each frequency, the config the rule that
        # makes them.
        factors = self._array("rope_freqs.weight")
        rule = {
            "rope_type": "llama3",
            "factor": _shortest(float(factors.max())),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if not np.allclose(
            factors, _llama3_divisors(rule, config["rope_theta"], config["head_dim"]), rtol=1e-4
        ):
            raise UserError(
                f"{self.path}: rope_freqs.weight is not Llama 3's scaling (low 1, high 4, original context "
                "8192), and other rotary scalings cannot be told from a GGUF: give the Hugging Face folder"
            )
        return rule

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise UserError(f"{self.path}: no tensor {name}")
        return self._tensors[name][0]

    def _bytes(self, name: str) -> np.ndarray:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        shape, kind, offset = self._tensors[name]
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        count = math.prod(shape) // block * size
        return np.frombuffer(self._map, np.uint8, count, self._start + offset)

    def _array(self, name: str) -> np.ndarray:
        """The tensor in its own layout, float32."""
        from gguf import GGMLQuantizationType, dequantize

        shape, kind = self._tensors[name][0], GGMLQuantizationType(self._tensors[name][1])
        raw = self._bytes(name)
        plain = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(kind.name)
        if plain:
            return raw.view(plain).reshape(shape).astype(np.float32, copy=False)
        try:
            return dequantize(raw.reshape(*shape[:-1], -1), kind).astype(np.float32, copy=False)
        except NotImplementedError:
            raise UserError(f"{self.path}: {name}: the gguf package cannot dequantise {kind.name}") from None

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Hugging Face name -> the file's."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(k for k, v in MODEL_ARCH_NAMES.items() if v == self.metadata["general.architecture"])
        names = get_tensor_name_map(arch, self.config["num_hidden_layers"])
        table = models.from_config(self.config).table
        wanted = [name for path in table.rows for name in table.names(path)]
        found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in wanted}
        found = {name: ours for name, ours in found.items() if ours is not None and ours in self._tensors}
        rest = set(self._tensors) - set(found.values()) - {"rope_freqs.weight"}
        return found | {name: name for name in sorted(rest)}  # those that no row uses show as they are

    def names(self) -> list[str]:
        return list(self._names)

    def others(self) -> list[str]:
        return []

    def stored_name(self, name: str) -> str:  # an export has Hugging Face's names
        return name

    def torch_name(self, name: str) -> str:
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape(self._names[name])

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def get(self, name: str) -> np.ndarray:
        x = self._array(self._names[name])
        if self.config["model_type"] == "llama" and ("q_proj." in name or "k_proj." in name):
            # llama.cpp rotates neighbouring rows, Hugging Face the two halves of a head
            heads = self.config["num_attention_heads" if "q_proj." in name else "num_key_value_heads"]
            x = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        return x

    def kept(self, name: str) -> None:
        return None

    def get_kept(self, name: str) -> dict[str, np.ndarray]:
        raise AssertionError(name)

    def release(self, name: str) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            offset = self._start + self._tensors[self._names[name]][2]
            first = offset // mmap.PAGESIZE * mmap.PAGESIZE
            size = self._bytes(self._names[name]).nbytes
            self._map.madvise(mmap.MADV_DONTNEED, first, offset - first + size)

    @functools.cached_property
    def _digest(self) -> str:
        lines = [
            f"{name} {shape} {kind} {hashlib.sha256(self._bytes(name).data).hexdigest()}\n"
            for name, (shape, kind, _) in sorted(self._tensors.items())
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def fingerprint(self) -> str:
        return self._digest

    @property
    def generation_config(self) -> dict[str, Any]:
        ids = {k: v for k, v in self.config.items() if k.endswith("_token_id")}
        ends = [self.metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(i for i in ends if i is not None))
        return ids | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})

    def tokenizer(self):
        from transformers import PreTrainedTokenizerFast  # slow to import

        get = self.metadata.get
        tokens = get("tokenizer.ggml.tokens")
        if tokens is None:
            raise UserError(f"{self.path}: no tokenizer in the metadata (tokenizer.ggml.tokens)")

        def token(name):
            index = get(f"tokenizer.ggml.{name}_token_id")
            return None if index is None else tokens[index]

        return PreTrainedTokenizerFast(
            tokenizer_object=build_tokenizer(self.metadata, self.path),
            bos_token=token("bos"),
            eos_token=token("eos"),
            pad_token=token("padding") or token("eos"),
            unk_token=token("unknown"),
            model_max_length=self.config["max_position_embeddings"],
            clean_up_tokenization_spaces=False,
            chat_template=get("tokenizer.chat_template"),
        )

    def write_tokenizer(self, folder: Path) -> list[str]:
        files = self.tokenizer().save_pretrained(str(folder))
        return sorted(Path(f).name for f in files if Path(f).is_file())


def _shortest(value):
    """A float32 of the metadata as its shortest decimal: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama3_divisors(rule: dict, theta: float, head_dim: int) -> np.ndarray:
    """What ops.rope_frequencies divides each of the H/2 frequencies by, in float64."""
    freq = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    blend = (rule["original_max_position_embeddings"] * freq / (2 * np.pi) - low) / (high - low)
    blend = np.clip(blend, 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / rule["factor"] + blend)


def build_tokenizer(metadata: dict[str, Any], path: Path):
    """A tokenizers.Tokenizer from tokenizer.ggml.*: byte-level BPE ("gpt2") or SentencePiece's ("llama")."""
    import tokenizers
    from tokenizers import processors

    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    vocab = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != UNUSED}
    if kind == "gpt2":
        out = _byte_level(metadata, vocab, path)
    elif kind == "llama":
        out = _sentencepiece(metadata, vocab)
    else:
        raise UserError(f"{path}: tokenizer model {kind!r} is not supported; supported: gpt2, llama")
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (CONTROL, USER_DEFINED) or (type_ == UNKNOWN and kind == "llama"):
            special = type_ != USER_DEFINED
            out.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    bos, eos = (metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos"))
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and bos is not None
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False) and eos is not None
    if add_bos or add_eos:
        used = [(tokens[i], i) for i, on in ((bos, add_bos), (eos, add_eos)) if on]
        single = [f"{tokens[bos]}:0"] * add_bos + ["$A:0"] + [f"{tokens[eos]}:0"] * add_eos
        pair = single + [x.replace(":0", ":1").replace("$A", "$B") for x in single]
        out.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)
    return out


def _byte_level(metadata, vocab, path: Path):
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; supported: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. The model's Hugging Face folder would do."
        )
    pre = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    out = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=pre.ignore_merges))
    steps: list = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.split:
        steps.append(pre_tokenizers.Split(Regex(pre.split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    out.pre_tokenizer = pre_tokenizers.Sequence(steps)
    out.decoder = decoders.ByteLevel()
    if pre.nfc:
        out.normalizer = normalizers.NFC()
    return out


def _sentencepiece(metadata, vocab):
    """SentencePiece BPE has no merges: two pieces merge if their join is a piece, the best score first."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens = metadata["tokenizer.ggml.tokens"]
    scores = metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    plain = [i for i, type_ in enumerate(types) if type_ == NORMAL]
    merges = []
    for i in sorted(plain, key=lambda i: (-scores[i], i)):
        cuts = ((tokens[i][:k], tokens[i][k:]) for k in range(1, len(tokens[i])))
        pairs = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    out = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    out.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * bool(prefix) + [normalizers.Replace(" ", "▁")]
    )
    out.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * bool(prefix)
    )
    return out
