"""Quantised checkpoints, packed here by each format's definition, and by its own library where installed."""

import json

import ml_dtypes
import numpy as np
import pytest

from ftjax import quantised
from ftjax.errors import UserError

BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
F32 = np.dtype(np.float32)
NF4 = np.array(  # arXiv:2305.14314, appendix E
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    + [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    + [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    + [0.7229568362236023, 1.0],
    np.float32,
)
FP4 = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float32)
FP4 = np.concatenate((FP4, -FP4))


@pytest.fixture(autouse=True, params=[1 << 18, 100])
def tile(request, monkeypatch):
    """Matrices in one piece, and in several."""
    monkeypatch.setattr(quantised, "TILE", request.param)


def read(tensors, settings, dtype="float32", **config):
    config = {"dtype": dtype, "quantization_config": settings, **config}
    entries = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    return quantised.Dequantised("model", config, entries, tensors.__getitem__)


def same(source, name, wanted):
    """`name` is `wanted`, bit for bit."""
    got = source.get(name)
    assert source.shape(name) == got.shape == wanted.shape
    assert source.dtype(name) == got.dtype == wanted.dtype
    bits = f"u{got.itemsize}"
    np.testing.assert_array_equal(got.view(bits), np.ascontiguousarray(wanted).view(bits))


def to_torch(x):
    torch = pytest.importorskip("torch")
    kinds = {BF16: torch.bfloat16, F8: torch.float8_e4m3fn}
    if x.dtype in kinds:
        return torch.from_numpy(x.view(f"u{x.itemsize}").copy()).view(kinds[x.dtype])
    return torch.from_numpy(x.copy())


def to_numpy(x):
    torch = pytest.importorskip("torch")
    kinds = {torch.bfloat16: (torch.uint16, BF16), torch.float8_e4m3fn: (torch.uint8, F8)}
    if x.dtype in kinds:
        raw, dtype = kinds[x.dtype]
        return x.detach().contiguous().view(raw).numpy().view(dtype)
    return x.detach().contiguous().numpy()


def pack(codes, bits):
    """Codes [..., n] into int32 words [..., ceil(n * bits / 32)], low bits first."""
    per = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // per), np.uint32)
    for i in range(per):
        words |= codes[..., i::per].astype(np.uint32) << np.uint32(i * bits)
    return words.view(np.int32)


# -- MXFP4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_equals_transformers(dtype):
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    E, R, G = 3, 80, 5
    blocks = rng.integers(0, 256, (E, R, G, 16), dtype=np.uint8)
    scales = rng.integers(0, 255, (E, R, G), dtype=np.uint8)  # 255 is a NaN
    bias = rng.standard_normal((E, R)).astype(BF16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_bias": bias, f"{name}_blocks": blocks, f"{name}_scales": scales}
    source = read(tensors, {"quant_method": "mxfp4"}, dtype)
    assert source.names() == [f"{name}_bias", name]
    assert source.parts(name) == [f"{name}_blocks", f"{name}_scales"]
    assert source.get(f"{name}_bias") is bias
    wanted = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=getattr(torch, dtype)
    )
    with np.errstate(over="ignore"):
        same(source, name, to_numpy(wanted))


# -- float8 blocks


def blocks_of(scales, block, shape):
    """A scale for each element, by its index."""
    out = np.empty(shape, np.float32)
    for index in np.ndindex(*shape):
        out[index] = scales[(*index[:-2], index[-2] // block[0], index[-1] // block[1])]
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "shape, block",
    [((70, 90), (32, 16)), ((2, 33, 40), (16, 32)), ((64, 96), (32, 32)), ((5, 7), (128, 128))],
)
def test_fp8_blocks(shape, block, dtype):
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal(shape) * 50).astype(F8)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scales = rng.uniform(1e-4, 1e-2, grid).astype(np.float32)
    norm = rng.standard_normal(8).astype(BF16)
    kept = rng.standard_normal((4, 4)).astype(BF16)
    tensors = {"norm.weight": norm, "q.weight": weight, "q.weight_scale_inv": scales, "head.weight": kept}
    source = read(tensors, {"quant_method": "fp8", "weight_block_size": list(block)}, dtype)
    assert source.names() == ["norm.weight", "q.weight", "head.weight"]
    wanted = weight.astype(np.float32) * blocks_of(scales, block, shape)
    same(source, "q.weight", wanted.astype(source.dtype("q.weight")))
    same(source, "head.weight", kept)


@pytest.mark.parametrize("exponents", [False, True])
def test_fp8_equals_transformers(exponents):
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((256, 384)) * 50).astype(F8)
    scales = rng.uniform(1e-4, 1e-2, (2, 3)).astype(np.float32)
    if exponents:
        scales = rng.integers(100, 130, (2, 3), dtype=np.uint8)
    tensors = {"q.weight": weight, "q.weight_scale_inv": scales}
    source = read(tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}, "bfloat16")
    wanted = Fp8Dequantize(None)._dequantize_one(to_torch(weight), to_torch(scales), torch.bfloat16)
    same(source, "q.weight", to_numpy(wanted))


@pytest.mark.parametrize(
    "method, suffix, shape",
    [("fp8", "weight_scale_inv", ()), ("fp8", "weight_scale", (1,)), ("fbgemm_fp8", "weight_scale", (12, 1))],
)
def test_fp8_without_blocks(method, suffix, shape):
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((12, 20)) * 50).astype(F8)
    scale = rng.uniform(0.01, 0.1, shape).astype(BF16)
    tensors = {"q.weight": weight, f"q.{suffix}": scale, "q.activation_scale": np.array(2.0, BF16)}
    tensors["q.input_scale"] = np.array(2.0, np.float32)
    source = read(tensors, {"quant_method": method, "weight_block_size": None})
    assert source.names() == ["q.weight"]
    same(source, "q.weight", weight.astype(np.float32) * scale.astype(np.float32))


# -- compressed-tensors


def compressed(fmt, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": fmt}}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": groups}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_compressed_packed(bits, asymmetric, order):
    rng = np.random.default_rng(4)
    out, ins, groups = 12, 36, 3
    low = -(1 << (bits - 1))
    codes = rng.integers(low, -low, (out, ins))
    zeros = rng.integers(low, -low, (out, groups)) if asymmetric else np.zeros((out, groups), int)
    scales = rng.uniform(0.01, 0.1, (out, groups)).astype(BF16)
    group = np.arange(ins) // (ins // groups)
    tensors = {
        "q.weight_packed": pack(codes - low, bits),
        "q.weight_scale": scales,
        "q.weight_shape": np.array([out, ins]),
    }
    if asymmetric:
        tensors["q.weight_zero_point"] = np.ascontiguousarray(pack((zeros - low).T, bits).T)
    if order:
        group = rng.permutation(group).astype(np.int32)
        tensors["q.weight_g_idx"] = group
    source = read(tensors, compressed("pack-quantized", num_bits=bits))
    assert source.names() == ["q.weight"]
    wanted = (codes - zeros[:, group]).astype(np.float32) * scales.astype(np.float32)[:, group]
    same(source, "q.weight", wanted)


@pytest.mark.parametrize("per", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize("kind", ["float", "int"])
def test_compressed_bytes(per, kind):
    rng = np.random.default_rng(5)
    out, ins = 12, 36
    weight = rng.integers(-128, 128, (out, ins)).astype(np.int8)
    if kind == "float":
        weight = (rng.standard_normal((out, ins)) * 50).astype(F8)
    shape = {"tensor": (1,), "channel": (out, 1), "group": (out, 3), "block": (2, 3)}[per]
    scales = rng.uniform(0.01, 0.1, shape).astype(BF16)
    wide = scales.astype(np.float32)
    if per == "block":
        wide = blocks_of(wide, (8, 16), (out, ins))
    elif per == "group":
        wide = wide[:, np.arange(ins) // 12]
    tensors = {"q.weight": weight, "q.weight_scale": scales, "q.input_scale": np.ones(1, BF16)}
    tensors["attn.k_scale"] = np.ones(1, BF16)
    values = weight.astype(np.float32)
    if kind == "int" and per == "channel":
        zeros = rng.integers(-100, 100, (out, 1)).astype(np.int8)
        tensors["q.weight_zero_point"] = zeros
        values = values - zeros
    source = read(tensors, compressed(f"{kind}-quantized", block_structure=[8, 16]), "bfloat16")
    assert source.names() == ["q.weight"]
    same(source, "q.weight", (values * wide).astype(BF16))


@pytest.mark.parametrize(
    "fmt, weights",
    [
        ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=16)),
        ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=16, symmetric=False)),
        ("pack-quantized", dict(num_bits=8, type="int", strategy="channel", symmetric=False)),
        ("int-quantized", dict(num_bits=8, type="int", strategy="channel")),
        ("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
        ("float-quantized", dict(num_bits=8, type="float", strategy="tensor")),
        ("float-quantized", dict(num_bits=8, type="float", strategy="block", block_structure=[16, 16])),
    ],
)
def test_equals_the_compressed_tensors_library(fmt, weights):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    compressors = pytest.importorskip("compressed_tensors.compressors")

    args = library.quantization.QuantizationArgs(**weights)
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=args)
    torch.manual_seed(0)
    out, ins = 24, 48
    shape = {"group": (out, 3), "channel": (out, 1), "tensor": (1,), "block": (2, 3)}[weights["strategy"]]
    state = {"weight": torch.randn(out, ins), "weight_scale": torch.rand(shape) * 0.1 + 0.02}
    if not weights.get("symmetric", True):
        state["weight_zero_point"] = torch.randint(-8, 8, shape, dtype=torch.int8)
    compressor = compressors.BaseCompressor.get_value_from_registry(fmt)
    packed = compressor.compress(dict(state), scheme)
    wanted = compressor.decompress(dict(packed), scheme)["weight"]
    tensors = {f"q.{k}": to_numpy(v) for k, v in packed.items()}
    source = read(tensors, compressed(fmt, **weights))
    assert source.names() == ["q.weight"]
    same(source, "q.weight", to_numpy(wanted))


# -- GPTQ and AWQ


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fmt", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["none", "even", "shuffled", "short", "one"])
def test_gptq(bits, fmt, order):
    rng = np.random.default_rng(6)
    out, ins, size = 24, 48, 16
    if order == "short":
        size = 32  # the last group has 16
    if order == "one":
        size = -1
    group = np.zeros(ins, np.int32) if size < 0 else np.arange(ins, dtype=np.int32) // size
    if order == "shuffled":
        group = rng.permutation(group)
    groups = group.max() + 1
    codes = rng.integers(0, 1 << bits, (out, ins))
    zeros = rng.integers(0, 1 << bits, (out, groups))
    zeros[0], zeros[1] = 0, (1 << bits) - 1
    scales = rng.uniform(0.01, 0.1, (out, groups)).astype(np.float16)
    stored = zeros if fmt == "gptq_v2" else (zeros - 1) % (1 << bits)
    tensors = {
        "q.bias": rng.standard_normal(out).astype(np.float16),
        "q.qweight": np.ascontiguousarray(pack(codes, bits).T),  # along the inputs
        "q.qzeros": pack(stored.T, bits),  # along the outputs
        "q.scales": np.ascontiguousarray(scales.T),
    }
    if order not in ("none", "short"):
        tensors["q.g_idx"] = group
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": False}
    source = read(tensors, settings | ({"checkpoint_format": fmt} if fmt else {}), "float16")
    assert source.names() == ["q.bias", "q.weight"]
    wanted = (codes - zeros[:, group]).astype(np.float32) * scales.astype(np.float32)[:, group]
    same(source, "q.weight", wanted.astype(np.float16))
    assert set(source.parts("q.weight")) == set(tensors) - {"q.bias"}


def test_awq():
    rng = np.random.default_rng(7)
    out, ins, groups = 24, 48, 3
    codes, zeros = rng.integers(0, 16, (ins, out)), rng.integers(0, 16, (groups, out))
    scales = rng.uniform(0.01, 0.1, (groups, out)).astype(np.float16)

    def pack_outputs(x):
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # the output in each 4 bits of a word, low bits first
        return pack(x.reshape(len(x), -1, 8)[:, :, order].reshape(x.shape), 4)

    tensors = {"q.qweight": pack_outputs(codes), "q.qzeros": pack_outputs(zeros), "q.scales": scales}
    source = read(tensors, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, "float16")
    assert source.names() == ["q.weight"]
    group = np.arange(ins) // 16
    wanted = (codes - zeros[group]).astype(np.float32) * scales.astype(np.float32)[group]
    same(source, "q.weight", wanted.T.astype(np.float16))


# -- bitsandbytes


def quantise_blocks(x, code, size):
    """Nearest codes uint8 [n] and absmax float32 of each run of `size`."""
    x = np.pad(x.reshape(-1), (0, -x.size % size)).reshape(-1, size)
    absmax = np.abs(x).max(1)
    return np.abs(x[..., None] / absmax[:, None, None] - code).argmin(-1).astype(np.uint8), absmax


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind, code", [("nf4", NF4), ("fp4", FP4)])
@pytest.mark.parametrize("shape, size", [((24, 64), 64), ((10, 13), 16)])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4bit(kind, code, shape, size, nested, dtype):
    rng = np.random.default_rng(8)
    weight = rng.standard_normal(shape).astype(np.float32)
    codes, absmax = quantise_blocks(weight, code, size)
    count = weight.size
    flat = codes.reshape(-1)[: count + count % 2]
    facts = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": shape}
    tensors = {
        "q.weight": (flat[0::2] << 4 | flat[1::2])[:, None],
        "q.weight.absmax": absmax,
        "q.weight.quant_map": code,
    }
    if nested:
        offset = np.float32(absmax.mean())
        code8 = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        codes8, absmax8 = quantise_blocks(absmax - offset, code8, 4)
        facts |= {"nested_blocksize": 4, "nested_offset": float(offset), "nested_dtype": "float32"}
        tensors["q.weight.absmax"] = codes8.reshape(-1)[: absmax.size]
        tensors["q.weight.nested_absmax"] = absmax8
        tensors["q.weight.nested_quant_map"] = code8
        absmax = (code8[codes8] * absmax8[:, None]).reshape(-1)[: absmax.size] + offset
    state = json.dumps(facts).encode()
    tensors[f"q.weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(state, np.uint8)
    source = read(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, dtype)
    assert source.names() == ["q.weight"]
    assert set(source.parts("q.weight")) == set(tensors)
    wanted = (code[codes] * absmax[:, None]).reshape(-1)[:count].reshape(shape)
    same(source, "q.weight", wanted.astype(source.dtype("q.weight")))


def test_bitsandbytes_8bit():
    rng = np.random.default_rng(9)
    weight = rng.integers(-127, 128, (12, 20)).astype(np.int8)
    absmax = rng.uniform(0.1, 3, 12).astype(np.float32)
    tensors = {"q.weight": weight, "q.SCB": absmax, "q.weight_format": np.array(0, np.uint8)}
    source = read(tensors, {"load_in_8bit": True})  # old files have no quant_method
    assert source.names() == ["q.weight"]
    same(source, "q.weight", weight * (absmax / np.float32(127))[:, None])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_equals_the_bitsandbytes_library(kind, nested, storage):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    # rows of whole blocks: with others the library's CPU kernel (0.50.2) does not give back what it quantised
    weight = torch.randn(48, 128, dtype=torch.bfloat16)
    packed, state = library.functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, quant_storage=getattr(torch, storage)
    )
    tensors = {f"q.weight.{k}": to_numpy(v) for k, v in state.as_dict(packed=True).items()}
    tensors["q.weight"] = to_numpy(packed)
    source = read(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bfloat16")
    same(source, "q.weight", to_numpy(library.functional.dequantize_4bit(packed, state)))


def test_equals_the_bitsandbytes_library_8bit():
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    codes, absmax, _ = library.functional.int8_vectorwise_quant(torch.randn(16, 64, dtype=torch.float16))
    tensors = {"q.weight": to_numpy(codes), "q.SCB": to_numpy(absmax)}
    source = read(tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    wanted = library.functional.int8_vectorwise_dequant(codes, absmax)
    # the library multiplies twice, by absmax and by 1/127: two more roundings of float32
    np.testing.assert_allclose(source.get("q.weight"), to_numpy(wanted), rtol=3 * 2**-24, atol=0)


# -- Settings and errors


def test_unquantised_config():
    settings = {"quant_method": "fp8"}
    config = {"model_type": "x", "quantization_config": settings, "vocab_size": 9}
    assert quantised.quantization(config) == settings
    assert quantised.unquantised_config(config) == {"model_type": "x", "vocab_size": 9}
    config = {"model_type": "x", "text_config": {"vocab_size": 9, "quantization_config": settings}}
    assert quantised.quantization(config) == settings
    assert quantised.unquantised_config(config) == {"model_type": "x", "text_config": {"vocab_size": 9}}
    assert "quantization_config" in config["text_config"]
    assert quantised.quantization({"model_type": "x"}) is None


def test_without_quantisation_all_comes_as_it_is():
    tensors = {"q.weight": np.zeros((2, 3), np.int8), "q.input_scale": np.zeros(1, np.float32)}
    source = read(tensors, None, "int8")
    assert source.names() == list(tensors)
    assert all(source.get(n) is tensors[n] and source.parts(n) == [n] for n in tensors)


def test_dtype_of_the_config():
    tensors = {"q.weight": np.zeros((2, 3), F8), "q.weight_scale_inv": np.array(1.0, np.float32)}
    settings = {"quant_method": "fp8"}
    for config, wanted in [
        ({}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, "float16"),
    ]:
        assert read(tensors, settings, **{"dtype": None, **config}).dtype("q.weight").name == wanted
    with pytest.raises(UserError, match="int4.*bfloat16"):
        read(tensors, settings, "int4")


def words(*shape):
    return np.zeros(shape, np.int32)


GPTQ = {
    "q.qweight": words(6, 24),
    "q.qzeros": words(3, 3),
    "q.scales": np.ones((3, 24), np.float16),
    "q.g_idx": np.arange(48, dtype=np.int32) // 16,
}
FP8 = {"q.weight": np.zeros((64, 64), F8), "q.weight_scale_inv": np.ones((2, 2), np.float32)}
PACKED = {
    "q.weight_packed": words(8, 4),
    "q.weight_scale": np.ones((8, 2), BF16),
    "q.weight_shape": np.array([8, 32]),
}
NF4_TENSORS = {
    "q.weight": np.zeros((32, 1), np.uint8),
    "q.weight.absmax": np.ones(1, np.float32),
    "q.weight.quant_map": NF4,
    "q.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"blocksize": 64, "shape": [8, 8]}', np.uint8),
}
MXFP4 = {"e_blocks": np.zeros((2, 8, 1, 16), np.uint8), "e_scales": np.zeros((2, 8, 1), np.uint8)}
BLOCK32 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
BNB = {"quant_method": "bitsandbytes"}
PACK = compressed("pack-quantized")


@pytest.mark.parametrize(
    "tensors, settings, message",
    [
        ({}, {"quant_method": "aqlm"}, "aqlm.*mxfp4, fp8.*unquantised model, or a GGUF"),
        ({}, {"bits": 4}, "None.*not read"),
        ({}, compressed("nvfp4-pack-quantized"), "nvfp4-pack-quantized.*float-quantized"),
        ({}, PACK | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({}, PACK | {"transform_config": {"config_groups": {"a": {}}}}, "rotated"),
        (PACKED | {"q.weight_packed": words(8, 3)}, PACK, "weight_packed.*4 or 8 bits"),
        (PACKED | {"q.weight_scale": np.ones((4, 2), BF16)}, PACK, "weight_scale.*8, groups"),
        (GPTQ, {"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin.*gptq_v2"),
        (GPTQ | {"q.qzeros": words(3, 2)}, {"quant_method": "gptq"}, "qzeros.*4 or 8 bits"),
        (GPTQ | {"q.qweight": words(6, 16)}, {"quant_method": "gptq"}, "qweight.*24"),
        ({k: v for k, v in GPTQ.items() if k != "q.qzeros"}, {"quant_method": "gptq"}, "qzeros is missing"),
        (GPTQ, {"quant_method": "awq", "version": "gemv"}, "gemv.*gemm"),
        ({"q.weight": words(3, 4)}, {"quant_method": "gptq"}, "q.weight .int32.*does not belong"),
        ({"q.weight": FP8["q.weight"]}, BLOCK32, "q.weight .float8_e4m3fn.*does not belong"),
        (FP8, BLOCK32 | {"weight_block_size": [32, 16]}, r"weight_scale_inv.*\[2, 4\]"),
        (FP8 | {"q.weight": np.zeros((64, 64), np.int8)}, BLOCK32, "q.weight is int8.*float8"),
        (MXFP4 | {"e_scales": np.zeros((2, 8, 2), np.uint8)}, {"quant_method": "mxfp4"}, "e_scales.*2, 8, 1"),
        ({"e_blocks": MXFP4["e_blocks"]}, {"quant_method": "mxfp4"}, "e_scales is missing"),
        (NF4_TENSORS | {"q.weight": np.zeros((31, 1), np.uint8)}, BNB, "q.weight .*32 bytes"),
        (NF4_TENSORS | {"q.weight.absmax": np.ones(2, np.float32)}, BNB, "absmax.*1"),
        (
            NF4_TENSORS | {"q.weight.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)},
            BNB,
            "bitsandbytes__nf4 is damaged",
        ),
        (
            {
                "q.weight": np.zeros((2, 4), np.int8),
                "q.SCB": np.ones(2, np.float32),
                "q.weight_format": np.array(2, np.uint8),
            },
            BNB,
            "weight_format is 2",
        ),
    ],
)
def test_errors(tensors, settings, message):
    with pytest.raises(UserError, match=f"(?s)^model.*{message}"):
        read(tensors, settings)


@pytest.mark.parametrize(
    "change, size, message",
    [
        ({"q.g_idx": np.full(48, 3, np.int32)}, 16, "g_idx has groups 3…3, scales have 3"),
        ({"q.g_idx": np.zeros(0, np.int32)}, 32, "3 groups for 48 columns in groups of 32"),
    ],
)
def test_errors_of_groups(change, size, message):
    source = read(GPTQ | change, {"quant_method": "gptq", "group_size": size})
    with pytest.raises(UserError, match=message):
        source.get("q.weight")


def test_a_config_that_says_more_than_the_files():
    plain = {"model.layers.0.mlp.up_proj.weight": (np.dtype(np.float32), (4, 4))}
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 2}}
    with pytest.raises(UserError, match="says quant_method='gptq', yet no tensor is stored so"):
        quantised.Dequantised("folder", config, plain, lambda name: np.zeros((4, 4), np.float32))
