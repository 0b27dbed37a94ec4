"""What operations are taken for, and how the time of a trace is divided.

The traces of CPUs are real ones. Those of GPUs and TPUs are written here, from the names that such traces are
known to hold: none was recorded on the device. The programs of TPUs are real (compiled ahead of time:
test_a_program_of_a_tpu)."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ftjax import trace
from ftjax.trace import Event, Op

pytestmark = pytest.mark.fast


def varint(n: int) -> bytes:
    out = b""
    n &= 2**64 - 1
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(fields: dict) -> bytes:
    """Protobuf's wire format of {number: int, text, bytes, message (a dict), or a list of them}."""
    out = b""
    for number, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int):
                out += varint(number << 3) + varint(value)
                continue
            data = message(value) if isinstance(value, dict) else value
            data = data.encode() if isinstance(data, str) else data
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def instruction(id: int, name: str, opcode: str, dims=(), operands=(), op_name="", **more) -> dict:
    """Of an HloInstructionProto; `more` by the names below."""
    numbers = dict(target=28, config=43, dot=30, called=38, convolution=16, window=15)
    shape = {3: b"".join(map(varint, dims))}
    fields = {1: name, 2: opcode, 3: shape, 7: {2: op_name}, 35: id, 36: list(operands)}
    return fields | {numbers[k]: v for k, v in more.items()}


def program(*computations: list[dict]) -> bytes:
    """An HloProto; computation i has the id i + 1."""
    return message({1: {1: "jit_step", 3: [{2: rows, 5: i + 1} for i, rows in enumerate(computations)]}})


X, W = instruction(1, "x", "parameter", (64, 32)), instruction(2, "w", "parameter", (32, 16))
DOT = {1: b"\x01", 2: b"\x00"}
GEMM = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
PATH = "jit(train_step)/transpose(jvp(Llama))/layers/"


@pytest.mark.parametrize(
    "one,category,flops",
    [
        (instruction(3, "dot.1", "dot", (64, 16), (1, 2), dot=DOT), "matmul", 2 * 64 * 32 * 16),
        (
            instruction(3, "dot.2", "dot", (64, 16), (1, 2), PATH + "attention/dot_general", dot=DOT),
            "attention",
            65536,
        ),
        # the o projection reads attention's result and is none
        (
            instruction(3, "dot.3", "dot", (64, 16), (1, 2), PATH + "BTNH,NHD->BTD/dot_general", dot=DOT),
            "matmul",
            65536,
        ),
        (instruction(3, "f.1", "fusion", (64, 16), (1, 2), called=1), "matmul", 65536),
        (instruction(3, "f.2", "fusion", (64, 16), (1, 2), called=2), "other", 0),
        (instruction(3, "f.3", "fusion", (64, 16), (1, 2), called=3), "copies", 0),
        (instruction(3, "f.4", "fusion", (64, 16), (1, 2), called=4), "other", 0),
        (instruction(3, "f.5", "fusion", (64, 16), (1, 2), called=5), "matmul", 65536),
        (instruction(3, "f.6", "fusion", (64, 16), (1, 2), PATH + "attention/exp", called=2), "attention", 0),
        (
            instruction(3, "cc.1", "custom-call", (64, 16), (1, 2), target="__cublas$gemm", config=GEMM),
            "matmul",
            65536,
        ),
        (
            instruction(
                3, "cc.2", "custom-call", (64, 16), (1, 2), target="__cublas$lt$matmul$f8", config=GEMM
            ),
            "matmul",
            0,
        ),
        (
            instruction(3, "cc.3", "custom-call", (64, 16), (1, 2), target="__cudnn$fmhaSoftmax"),
            "attention",
            0,
        ),
        (
            instruction(
                3, "cc.4", "custom-call", (), (), target="tpu_custom_call", op_name=PATH + "attention/splash"
            ),
            "attention",
            0,
        ),
        (instruction(3, "cc.5", "custom-call", (), (), target="Sharding"), "other", 0),
        (instruction(3, "g.1", "fusion", (64, 16), (1, 2), config='{"kind":"__triton_gemm"}'), "matmul", 0),
        (instruction(3, "all-gather-start.1", "all-gather-start", (64,), (1,)), "collectives", 0),
        (instruction(3, "reduce-scatter.1", "reduce-scatter", (64,), (1,)), "collectives", 0),
        (instruction(3, "collective-permute-done", "collective-permute-done", (64,), (1,)), "collectives", 0),
        (instruction(3, "copy.1", "copy", (64, 32), (1,)), "copies", 0),
        (instruction(3, "copy-start.1", "copy-start", (64, 32), (1,)), "copies", 0),
        (instruction(3, "dus.1", "dynamic-update-slice", (64, 32), (1,)), "copies", 0),
        (instruction(3, "add.1", "add", (64, 32), (1,)), "other", 0),
        (instruction(3, "while.1", "while", (), (1,), called=2), None, 0),
    ],
)
def test_an_instruction_is_what_its_program_says(one, category, flops):
    scalar = instruction(4, "i", "add", ())
    inner = [
        [X, W, instruction(3, "d", "dot", (64, 16), (1, 2), dot=DOT)],
        [X, instruction(3, "e", "exponential", (64, 32), (1,))],
        [
            X,
            scalar,
            instruction(3, "u", "dynamic-update-slice", (64, 32), (1,)),
            instruction(5, "c", "convert", (64, 32)),
        ],
        [X, instruction(3, "c2", "convert", (64, 32), (1,))],
        # a TPU's product that hides a collective
        [
            X,
            W,
            instruction(3, "d2", "dot", (64, 16), (1, 2), dot=DOT),
            instruction(5, "g", "all-gather", (64, 64)),
        ],
    ]
    found = trace.read_program(program(*inner, [X, W, one]))
    assert (found[one[1]].category, found[one[1]].flops) == (category, flops)


def test_a_convolution_counts_the_taps_that_fall_on_inputs():
    """A TPU's "BTD,DKH->BTKH": K = 2 is a window over one input padded to three."""
    kernel = instruction(2, "w", "parameter", (32, 2, 16))
    axes = {3: 0, 4: 2, 6: b"\x01", 7: 0, 8: 1, 9: 0, 10: 2, 11: b"\x02", 12: b"\x01"}
    window = {1: {1: 2, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1}}
    x = instruction(1, "x", "parameter", (64, 32, 1))
    one = instruction(3, "conv", "convolution", (64, 2, 16), (1, 2), convolution=axes, window=window)
    assert trace.read_program(program([x, kernel, one]))["conv"].flops == 2 * 64 * 32 * 2 * 16


@pytest.mark.parametrize(
    "name,category",
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>(Params)", "matmul"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_nn", "matmul"),
        (
            "void cublasLt::splitKreduce_kernel<32, 16, int, float>(Params<float>)",
            "matmul",
        ),
        ("void gemv2T_kernel_val<int, int, float>", "matmul"),
        ("gemm_fusion_dot_12_0", "matmul"),
        ("Cijk_Ailk_Bljk_BBS_BH_MT256x128x32", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x64x128", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("ncclKernel_ReduceScatter_RING_LL_Sum_bf16", "collectives"),
        ("MemcpyD2D", "copies"),
        ("MemcpyH2D", "copies"),
        ("MemsetD32", "copies"),
        ("wrapped_transpose", "copies"),
        ("loop_dynamic_update_slice_fusion_3", "copies"),
        ("loop_add_convert_fusion_17", "other"),
        ("input_reduce_fusion_2", "other"),
        ("triton_softmax_4", "other"),
    ],
)
def test_a_kernel_that_no_program_knows_is_judged_by_its_name(name, category):
    assert trace.by_kernel(name) == category


def plane(name: str, lines: dict, start: int = 0) -> dict:
    """An XPlane of {line: [(name, start µs, µs, {stat: text})]}."""
    names = sorted({e[0] for events in lines.values() for e in events})
    stats = sorted({k for events in lines.values() for e in events for k in e[3]})
    rows = [
        {
            2: line,
            3: start,
            4: [
                {
                    1: names.index(n) + 1,
                    2: int(at * 1e6),
                    3: int(long * 1e6),
                    4: [{1: stats.index(k) + 1, 5: v} for k, v in more.items()],
                }
                for n, at, long, more in events
            ],
        }
        for line, events in lines.items()
    ]
    events = [{1: i + 1, 2: {1: i + 1, 2: n}} for i, n in enumerate(names)]
    return {2: name, 3: rows, 4: events, 5: [{1: i + 1, 2: {1: i + 1, 2: n}} for i, n in enumerate(stats)]}


def metadata(proto: bytes) -> dict:
    """The plane that holds the program jit_step."""
    event = {1: 7, 2: "jit_step(7)", 5: {1: 1, 6: proto}}
    return {2: "/host:metadata", 4: {1: 7, 2: event}, 5: {1: 1, 2: {1: 1, 2: "hlo_proto"}}}


def written(tmp_path, *planes):
    file = tmp_path / "host.xplane.pb"
    file.write_bytes(message({1: list(planes)}))
    return file


def test_a_trace_of_a_gpu(tmp_path):
    """Kernels on two streams, some in a CUDA graph and so without their operation's name."""
    step = {"hlo_module": "jit_step"}
    dot = instruction(3, "gemm.1", "custom-call", (64, 16), (1, 2), target="__cublas$gemm", config=GEMM)
    rows = [
        X,
        W,
        dot,
        instruction(5, "copy.2", "copy", (64, 32), (1,)),
        instruction(6, "loop_add_fusion.3", "add", (9,)),
    ]
    gpu = plane(
        "/device:GPU:0",
        {
            "Stream #13(Compute)": [
                ("nvjet_tst_128x128", 0, 100, step | {"hlo_op": "gemm.1"}),
                ("loop_add_fusion_3", 100, 20, {}),
                ("cudnn_generated_sdpa_flash_fprop", 120, 40, {}),
                ("input_transpose_kernel", 160, 5, step | {"hlo_op": "copy.2"}),
            ],
            "Stream #20(Collective)": [("ncclDevKernel_AllGather", 50, 80, step | {"hlo_op": "ag"})],
            "XLA Ops": [("gemm.1", 0, 100, {})],  # the same again, as some versions write it
        },
    )
    host = plane("/host:CPU", {"python": [("train", 0, 170, {"step_num": "3"})]})
    found = trace.breakdown(written(tmp_path, metadata(program(rows)), gpu, host))
    ms = {name: round(part.milliseconds * 1e3, 3) for name, part in found.parts.items()}
    # of the collective all is hidden but what no other kernel covers: nothing
    assert ms == {"matmul": 100, "attention": 40, "other": 20, "collectives": 0, "copies": 5}
    assert round(found.parts["collectives"].running * 1e3) == 80
    assert found.parts["matmul"].count == 1 and found.flops == 65536 and found.devices == 1


def test_a_trace_of_two_tpus(tmp_path):
    """A loop contains its operations; transfers run beside them on a line of their own."""
    dot = instruction(3, "fusion.1", "fusion", (64, 16), (1, 2), called=2)
    rows = [
        [
            X,
            W,
            dot,
            instruction(4, "while.2", "while", (), called=1),
            instruction(5, "all-gather-start.5", "all-gather-start"),
        ],
        [X, W, instruction(3, "d", "convolution", (64, 16), (1, 2), convolution={3: 0, 4: 1, 9: 0, 10: 1})],
    ]
    ops = [
        ("%while.2 = (bf16[64]) while(bf16[64] %x), body=%b", 0, 100, {}),
        ("%fusion.1 = bf16[64,16]{1,0} fusion(bf16[64,32] %x)", 10, 60, {}),
    ]
    lines = {
        "Steps": [("1", 0, 120, {})],
        "XLA Modules": [("jit_step(7)", 0, 120, {})],
        "XLA Ops": ops,
        "Async XLA Ops": [("%all-gather-start.5 = (bf16[8]) all-gather-start()", 40, 50, {})],
    }
    planes = [plane(f"/device:TPU:{i}", lines) for i in range(2)]
    found = trace.breakdown(written(tmp_path, metadata(program(*rows)), *planes))
    ms = {name: round(part.milliseconds * 1e3, 3) for name, part in found.parts.items()}
    assert ms == {"matmul": 60, "attention": 0, "other": 0, "collectives": 20, "copies": 0}
    assert found.devices == 2 and found.flops == 2 * 64 * 32 * 16


def test_a_trace_without_devices_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no operation"):
        trace.breakdown(written(tmp_path, plane("/host:CPU", {"python": [("f", 0, 1, {})]})))


def test_an_instant_counts_once():
    known = {"m": {"a": Op("matmul", 7, "a"), "c": Op("copies", 0, "c"), "o": Op("other", 0, "o")}}
    at = lambda name, start, end: Event(start, end, name, "m")  # noqa: E731
    events = [at("a", 0, 10), at("c", 5, 20), at("o", 15, 30), at("a", 8, 12), at("o", 40, 41)]
    found = trace.of_events({"d": events}, known)
    ns = {name: round(part.milliseconds * 1e6) for name, part in found.parts.items()}
    assert ns == {"matmul": 12, "attention": 0, "other": 16, "collectives": 0, "copies": 3}
    assert round(found.parts["copies"].running * 1e6) == 15 and found.flops == 14


def test_a_real_trace_of_this_cpu(tmp_path):
    """Scanned products: as many FLOPs as were executed, loops not counted beside what they hold."""

    @jax.jit
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((128, 128), jnp.float32), jnp.ones((5, 128, 128), jnp.float32)
    f(x, w).block_until_ready()
    with jax.profiler.trace(tmp_path):
        f(x, w).block_until_ready()
    (file,) = tmp_path.rglob("*.xplane.pb")
    found = trace.breakdown(file)
    assert found.flops == 5 * 2 * 128**3
    assert found.parts["matmul"].count == 5 and found.parts["matmul"].milliseconds > 0
    assert found.parts["collectives"].count == 0


@tpu.needs_libtpu
def test_a_program_of_a_tpu():
    """Real programs for a TPU say what they are: products with several axes are convolutions there, and one
    that needs gathered weights may hide the gathering."""
    B, T, D, N, H = 4, 512, 256, 4, 64

    def f(x, w, v):
        q = jnp.einsum("BTD,DNH->BTNH", x, w)
        with jax.named_scope("attention"):
            p = jnp.tanh(jnp.einsum("BTNH,BSNH->BNTS", q, q))
            y = jnp.einsum("BNTS,BSNH->BTNH", p, q)
        return jnp.einsum("BTNH,NHD->BTD", y, v)

    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=tpu.devices())
    by_row = NamedSharding(mesh, PartitionSpec("x"))
    shapes = [((B, T, D), by_row), ((D, N, H), by_row), ((N, H, D), by_row)]
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s, sharding in shapes]
    compiled: Any = tpu.program(f, *args).compiled
    (module,) = compiled.runtime_executable().hlo_modules()
    found = trace.read_program(message({1: module.as_serialized_hlo_module_proto()}))
    entry = re.search(r"\nENTRY .*?\n}", module.to_string(), re.S)
    assert entry is not None
    ops = [found[name] for name in re.findall(r"\n  (?:ROOT )?%?([\w.\-]+) = ", entry[0])]
    total = {c: sum(op.flops for op in ops if op.category == c) for c in trace.CATEGORIES}
    rows = B * T // 4
    assert total["attention"] == 2 * 2 * N * H * T * T * (B // 4)
    # the two with weights; where one is cut into parts of which some are done again, up to twice
    assert 2 * 2 * rows * D * N * H <= total["matmul"] <= 4 * 2 * rows * D * N * H
    assert any(op.category == "collectives" for op in ops)
    assert total["collectives"] == total["copies"] == 0
