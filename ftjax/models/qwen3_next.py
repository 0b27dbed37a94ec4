"""Qwen3-Next and Qwen3.5: three layers of linear attention (the gated delta rule, arXiv:2412.06464) before
each of gated softmax attention, norms around 1, experts with a shared one. Qwen Team 2025, "Qwen3-Next:
Towards Ultimate Training & Inference Efficiency"; the code of its release.

Letters beyond weights.py and moe.py, all of linear attention: Y heads of q and k, Z heads of v, O a head of
v, W the convolution's width, C its channels (every head of q, k and v), P what one head of q and k projects
to with its heads of v and gates, Q the decays' and betas' part of that, U = 2 a query and its gate.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from ftjax.models.decoder import (
    ATTENTION,
    LAYER,
    MLP,
    MLP_NORM,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    Block,
    Decoder,
    Keys,
    Rows,
)
from ftjax.models.llama import LlamaConfig
from ftjax.models.moe import ROUTER, SharedMoeBlock, expert_rows
from ftjax.models.qwen_moe import SHARED_EXPERT, QwenMoe, QwenMoeConfig
from ftjax.ops import activation, rms_norm
from ftjax.ops.delta import causal_conv, gated_delta_rule, gated_rms_norm, l2_normalize
from ftjax.weights import DEPTHWISE, Table, Weight

COMMON: Keys = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": None,
    "full_attention_interval": None,  # what layer_types is where it is not said
    "output_router_logits": None,
    "num_local_experts": None,  # another name of num_experts
    "router_aux_loss_coef": None,
    # said by Qwen3.5's files: what the model is anyway, and how its state is kept
    "attn_output_gate": (True, None),
    "mamba_ssm_dtype": None,
    "mtp_num_hidden_layers": None,
    "mtp_use_dedicated_embeddings": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig(LlamaConfig):
    layer_types: tuple[str, ...]
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int

    @property
    def sizes(self):
        K, N = self.linear_num_key_heads, self.linear_num_value_heads
        q, v = self.linear_key_head_dim, self.linear_value_head_dim
        widths = dict(Y=K, Z=N, O=v, W=self.linear_conv_kernel_dim, C=2 * K * q + N * v)
        return super().sizes | widths | dict(P=2 * q + 2 * v * N // K, Q=2 * N // K)


LINEAR = LAYER + "linear_attn."
ATTENTION_NORM: Rows = {"attn_norm": ATTENTION["attn_norm"]}
DELTA: Rows = ATTENTION_NORM | {
    "conv": Weight("CW", LINEAR + "conv1d.weight", DEPTHWISE),
    "decay": Weight("Z", LINEAR + "A_log", init="zeros"),
    "decay_bias": Weight("Z", LINEAR + "dt_bias", init="ones"),
    "delta_norm": Weight("O", LINEAR + "norm.weight", init="ones"),
    "o": Weight("ZO->D", LINEAR + "out_proj.weight"),
}
FUSED_INPUTS: Rows = {
    "qkvz": Weight("D->YP", LINEAR + "in_proj_qkvz.weight"),
    "ba": Weight("D->YQ", LINEAR + "in_proj_ba.weight"),
}
INPUTS: Rows = {
    "qkv": Weight("D->C", LINEAR + "in_proj_qkv.weight"),
    "z": Weight("D->ZO", LINEAR + "in_proj_z.weight"),
    "b": Weight("D->Z", LINEAR + "in_proj_b.weight"),
    "a": Weight("D->Z", LINEAR + "in_proj_a.weight"),
}
GATED_ATTENTION: Rows = ATTENTION | QK_NORM | {"q": Weight("D->NUH", LAYER + "self_attn.q_proj.weight")}
GATED_BIAS: Rows = (
    QKV_BIAS | O_BIAS | {"q_bias": Weight("NUH", LAYER + "self_attn.q_proj.bias", init="zeros")}
)


SILU = activation("silu")


def around_one(rows: Rows) -> Rows:
    """The rows with norms whose scale is 1 + the weight."""
    names = ("attn_norm", "mlp_norm", "q_norm", "k_norm", "final_norm")
    return {n: dataclasses.replace(row, init="zeros") if n in names else row for n, row in rows.items()}


class NextBlock(Block):
    def normalise(self, x, name: str):
        return rms_norm(x, self.w[name], self.cfg.rms_norm_eps, offset=1.0)


class GatedBlock(NextBlock):
    """Softmax attention whose result is gated feature by feature."""

    def attention(self, h_BTD):
        eqns = {"q": "BTD,DNUH->BTNUH", "k": "BTD,DKH->BTKH", "v": "BTD,DKH->BTKH"}
        q_BTNUH, k_BTKH, v_BTKH = self.linears(h_BTD, eqns)
        q_BTNH = self.normalise(q_BTNUH[:, :, :, 0], "q_norm")
        k_BTKH = self.normalise(k_BTKH, "k_norm")
        y_BTNH = self.attend(*self.rotate(q_BTNH, k_BTKH), v_BTKH)
        y_BTNH *= jax.nn.sigmoid(q_BTNUH[:, :, :, 1].astype(jnp.float32)).astype(y_BTNH.dtype)
        return self.linear("BTNH,NHD->BTD", y_BTNH, "o")


class DeltaState(struct.PyTreeNode):
    """A stack of layers of linear attention so far: the rule's state [L, B, N, H, X] in float32 and the
    inputs of the convolution that it still looks back to, [L, B, W - 1, C] and their segments."""

    rule: jax.Array
    inputs: jax.Array
    segments: jax.Array

    def begin(self, prefix: "DeltaState") -> "DeltaState":
        return jax.tree.map(lambda x, p: jnp.broadcast_to(p, x.shape), self, prefix)

    def read(self, layer):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self)

    def write(self, layer, new: "DeltaState") -> "DeltaState":
        put = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda x, y: put(x, y.astype(x.dtype), layer, 0), self, new)


class DeltaBlock(NextBlock):
    """Linear attention: a short convolution, then the gated delta rule."""

    recurrent = True

    @classmethod
    def empty_state(cls, cfg, layers, batch, length, dtype):
        L, size = len(layers), cfg.sizes
        back = (L, batch, size["W"] - 1)
        rule = (L, batch, size["Z"], cfg.linear_key_head_dim, size["O"])
        return DeltaState(
            rule=jnp.zeros(rule, jnp.float32),
            inputs=jnp.zeros((*back, size["C"]), dtype),
            segments=jnp.zeros(back, jnp.int32),
        )

    @classmethod
    def mixing_flops(cls, cfg, pairs, tokens):
        # as a recurrence: k·S, the outer product that is added, q·S, over the state of each head
        return 6 * cfg.sizes["Z"] * cfg.linear_key_head_dim * cfg.sizes["O"] * tokens

    def inputs(self, h_BTD):
        """(q, k, v in one [B, T, C], gate [B, T, Z, O], beta's and the decay's logits [B, T, Z])."""
        eqns = {"qkv": "BTD,DC->BTC", "z": "BTD,DZO->BTZO", "b": "BTD,DZ->BTZ", "a": "BTD,DZ->BTZ"}
        return self.linears(h_BTD, eqns)

    def attention(self, h_BTD):
        cfg, (segments_BT, positions_BT) = self.cfg, self.shared.queries
        qkv_BTC, gate_BTZO, b_BTZ, a_BTZ = self.inputs(h_BTD)
        old = None if self.state is None else self.state.read(self.layer["index"])
        tail = None if old is None else (old.inputs, old.segments)
        qkv_BTC, tail = causal_conv(qkv_BTC, self.w["conv"], segments_BT, tail)
        qkv_BTC = SILU(qkv_BTC)

        heads, width = cfg.linear_num_key_heads, cfg.linear_key_head_dim
        q_BTC, k_BTC, v_BTC = jnp.split(qkv_BTC, [heads * width, 2 * heads * width], axis=-1)
        q_BTYH, k_BTYH = (l2_normalize(x.reshape(*x.shape[:2], heads, width)) for x in (q_BTC, k_BTC))
        v_BTZO = v_BTC.reshape(gate_BTZO.shape)
        a_BTZ = a_BTZ.astype(jnp.float32) + self.w["decay_bias"].astype(jnp.float32)
        decay_BTZ = -jnp.exp(self.w["decay"].astype(jnp.float32)) * jax.nn.softplus(a_BTZ)
        y_BTZO, rule = gated_delta_rule(
            q_BTYH * width**-0.5,
            k_BTYH,
            v_BTZO,
            decay_BTZ,
            jax.nn.sigmoid(b_BTZ.astype(jnp.float32)),
            segments_BT,
            positions_BT,
            None if old is None else old.rule,
        )
        if self.state is not None:
            self.state = self.state.write(self.layer["index"], DeltaState(rule, *tail))
        y_BTZO = gated_rms_norm(
            self.named(y_BTZO, "attention"), gate_BTZO, self.w["delta_norm"], cfg.rms_norm_eps
        )
        return self.linear("BTZO,ZOD->BTD", y_BTZO, "o")


class FusedDeltaBlock(DeltaBlock):
    """Its inputs are two products, each in order of the heads of q and k."""

    def inputs(self, h_BTD):
        size, q = self.cfg.sizes, self.cfg.linear_key_head_dim
        lead, half = h_BTD.shape[:2], (size["P"] - 2 * q) // 2
        both_BTYP, ba_BTYQ = self.linears(h_BTD, {"qkvz": "BTD,DYP->BTYP", "ba": "BTD,DYQ->BTYQ"})
        *qkv, gate_BTYX = jnp.split(both_BTYP, [q, 2 * q, 2 * q + half], axis=-1)
        qkv_BTC = jnp.concatenate([x.reshape(*lead, -1) for x in qkv], axis=-1)
        b_BTYX, a_BTYX = jnp.split(ba_BTYQ, 2, axis=-1)
        b_BTZ, a_BTZ = (x.reshape(*lead, size["Z"]) for x in (b_BTYX, a_BTYX))
        return qkv_BTC, gate_BTYX.reshape(*lead, size["Z"], size["O"]), b_BTZ, a_BTZ


class SparseGatedBlock(GatedBlock, SharedMoeBlock):
    pass


class SparseDeltaBlock(DeltaBlock, SharedMoeBlock):
    pass


class SparseFusedDeltaBlock(FusedDeltaBlock, SharedMoeBlock):
    pass


class Next(Decoder):
    """Kinds "linear" and "full", or "linear_sparse" and "full_sparse" where the MLP is one of experts."""

    LAYER_TYPES = ("full_attention", "linear_attention")

    @classmethod
    def sparse_layers(cls, cfg) -> list[bool]:
        return [False] * cfg.num_hidden_layers

    @classmethod
    def layer_kinds(cls, cfg):
        kinds = [kind.removesuffix("_attention") for kind in cfg.layer_types]
        sparse = cls.sparse_layers(cfg)
        return [kind + "_sparse" * is_sparse for kind, is_sparse in zip(kinds, sparse, strict=True)]

    @classmethod
    def linear_rows(cls, cfg) -> Rows:
        return DELTA | INPUTS

    @classmethod
    def block_rows(cls, cfg, kind):
        if kind.startswith("linear"):
            rows = cls.linear_rows(cfg)
        else:
            rows = GATED_ATTENTION | (GATED_BIAS if cfg.attention_bias else {})
        mlp = ROUTER | expert_rows() | SHARED_EXPERT if kind.endswith("sparse") else MLP
        return around_one(rows | MLP_NORM | mlp)

    @classmethod
    def outer_rows(cls, cfg):
        return around_one(super().outer_rows(cfg))

    @classmethod
    def others(cls, cfg):
        return Table.others + r"|mtp\..*"  # layers that only predict further tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(DeltaConfig, QwenMoeConfig):
    shared_expert_intermediate_size: int

    @property
    def sizes(self):
        return super().sizes | dict(I=self.shared_expert_intermediate_size)


class Qwen3Next(Next):
    Config = Qwen3NextConfig
    BLOCKS = {
        "linear": FusedDeltaBlock,
        "full": GatedBlock,
        "linear_sparse": SparseFusedDeltaBlock,
        "full_sparse": SparseGatedBlock,
    }
    KEYS = COMMON

    @classmethod
    def sparse_layers(cls, cfg):
        return [kind == "sparse" for kind in QwenMoe.layer_kinds(cfg)]

    @classmethod
    def linear_rows(cls, cfg):
        return DELTA | FUSED_INPUTS


class Qwen35(Next):
    Config = DeltaConfig
    BLOCKS = {"linear": DeltaBlock, "full": GatedBlock}
    KEYS = COMMON | {"mlp_only_layers": ([], None)}


class Qwen35Moe(Next):
    Config = Qwen3NextConfig
    BLOCKS = {"linear_sparse": SparseDeltaBlock, "full_sparse": SparseGatedBlock}
    KEYS = COMMON | {
        "mlp_only_layers": ([], None),
        "decoder_sparse_step": (1, None),
        "norm_topk_prob": (True, None),
    }

    @classmethod
    def config(cls, hf):
        always = dict(decoder_sparse_step=1, mlp_only_layers=(), norm_topk_prob=True)
        return cls.Config.read(hf, intermediate_size=hf.shared_expert_intermediate_size, **always)

    @classmethod
    def sparse_layers(cls, cfg):
        return [True] * cfg.num_hidden_layers
