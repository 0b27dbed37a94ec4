"""Gemma 4, the text model. Google 2026, ai.google.dev/gemma/docs/core/model_card_4.

Against Gemma 3: norms multiply by their weight alone; v is normed too and no scale is put on q · k; the
layers without a window have heads of another size and number, may take v from k's weight, and rotate only
some of a head. The small models add a look-up of each token of their own to every layer, and their last
layers attend to keys and values of earlier ones; the mixture of experts has experts beside the MLP.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.models.common import KV, ModelConfig
from ftjax.models.decoder import LAYER, MLP, QK_NORM, Decoder, Rows
from ftjax.models.gemma import GELU, NORMS, Gemma2, GemmaBlock
from ftjax.models.moe import MoeBlock
from ftjax.ops import einsum, l2_norm, lookup, rms_norm, rope, shard, top_k_softmax
from ftjax.weights import LOOKUP, Weight

SCALE: Rows = {"scale": Weight("Z", LAYER + "layer_scalar", init="ones")}
PER_LAYER: Rows = {
    "per_layer_gate": Weight("D->I", LAYER + "per_layer_input_gate.weight"),
    "per_layer_out": Weight("I->D", LAYER + "per_layer_projection.weight"),
    "per_layer_norm": Weight("D", LAYER + "post_per_layer_input_norm.weight", init="ones"),
}
PER_LAYER_INPUT: Rows = {
    "per_layer_embed": Weight("P->YI", "model.embed_tokens_per_layer.weight", LOOKUP),
    "per_layer_in": Weight("D->YI", "model.per_layer_model_projection.weight"),
    "per_layer_in_norm": Weight("I", "model.per_layer_projection_norm.weight", init="ones"),
}
EXPERTS: Rows = {
    "router": Weight("D->E", LAYER + "router.proj.weight", role="router"),
    "router_scale": Weight("D", LAYER + "router.scale", init="ones"),
    "expert_scale": Weight("E", LAYER + "router.per_expert_scale", init="ones"),
    "experts_gate_up": Weight("E:D->UM", LAYER + "experts.gate_up_proj"),
    "experts_down": Weight("E:M->D", LAYER + "experts.down_proj"),
    "experts_norm": Weight("D", LAYER + "pre_feedforward_layernorm_2.weight", init="ones"),
    "experts_post_norm": Weight("D", LAYER + "post_feedforward_layernorm_2.weight", init="ones"),
    "dense_post_norm": Weight("D", LAYER + "post_feedforward_layernorm_1.weight", init="ones"),
}
GLOBAL_AXES = str.maketrans("KH", "CJ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config(ModelConfig):
    rms_norm_eps: float
    attention_bias: bool
    final_logit_softcapping: float | None
    attention_k_eq_v: bool
    global_head_dim: int
    num_global_key_value_heads: int
    num_kv_shared_layers: int
    use_double_wide_mlp: bool
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    enable_moe_block: bool = False
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None

    @property
    def sizes(self):
        """Beyond weights.py and moe.py: J head_dim and C key/value heads of the layers without a window, I
        and P width and vocabulary of the look-ups in each layer, Y layers, U = 2, Z = 1."""
        return super().sizes | dict(
            J=self.global_head_dim,
            C=self.num_global_key_value_heads,
            I=self.hidden_size_per_layer_input,
            P=self.vocab_size_per_layer_input,
            Y=self.num_hidden_layers,
            E=self.num_experts or 0,
            M=self.moe_intermediate_size or 0,
            U=2,
            Z=1,
        )

    @property
    def first_shared(self) -> int:
        """The first layer that attends to an earlier layer's keys and values."""
        return self.num_hidden_layers - self.num_kv_shared_layers


class Local(GemmaBlock, MoeBlock):
    """A layer that attends within the window."""

    attends: ClassVar[str] = "sliding_attention"
    wide: ClassVar[bool] = False  # whether the MLP is twice as wide where the model has such

    def __call__(self, x_BTD):
        x_BTD += self.norm(self.attention(self.norm(x_BTD, "attn_norm")), "attn_post_norm")
        h_BTD = self.feed_forward(self.norm(x_BTD, "mlp_norm"))
        if "router" in self.w:
            h_BTD = self.norm(h_BTD, "dense_post_norm") + self.norm(self.sparse(x_BTD), "experts_post_norm")
        x_BTD += self.norm(h_BTD, "mlp_post_norm")
        if "per_layer_gate" in self.w:
            x_BTD += self.norm(self.per_layer(x_BTD), "per_layer_norm")
        # in transformers' module this is no parameter but a constant
        return x_BTD * jax.lax.stop_gradient(self.w["scale"]).astype(x_BTD.dtype)

    def normalise(self, x, name):
        return rms_norm(x, self.w[name], self.cfg.rms_norm_eps, offset=0.0)

    # -- attention

    scale = 1.0  # type: ignore[assignment]

    def rotary(self):
        return self.shared.rotary[self.attends]

    def q(self, h_BTD):
        return self.normalise(self.linear("BTD,DNH->BTNH", h_BTD, "q"), "q_norm")

    def qkv(self, h_BTD):
        eqns = {"q": "BTD,DNH->BTNH", "k": "BTD,DKH->BTKH", "v": "BTD,DKH->BTKH"}
        q_BTNH, k_BTKH, *v = self.linears(h_BTD, {name: eqn for name, eqn in eqns.items() if name in self.w})
        v_BTKH = l2_norm(v[0] if v else k_BTKH, self.cfg.rms_norm_eps)
        return self.normalise(q_BTNH, "q_norm"), self.normalise(k_BTKH, "k_norm"), v_BTKH

    @property
    def whole_keys(self) -> bool:  # type: ignore[override]
        return bool(self.carry)

    def remember(self, k_BTKH, v_BTKH):
        both = super().remember(k_BTKH, v_BTKH)
        if self.attends in self.carry:  # the last layer to write is the one that the shared ones read
            self.carry[self.attends] = both
        return both

    # -- MLP

    def mlp(self, h_BTD, prefix=""):
        F = "UF" if self.wide and self.cfg.use_double_wide_mlp else "F"
        gate, up = self.linears(h_BTD, dict.fromkeys(("gate", "up"), f"BTD,D{F}->BT{F}"))
        act = shard(self.named(self.gated(gate, up), "act"), "BT" + F)
        return self.linear(f"BT{F},{F}D->BTD", act, "down")

    def sparse(self, x_BTD):
        """The experts' output; the router sees x under a norm of its own."""
        x_XD = self.tokens(x_BTD)
        scale_D = self.w["router_scale"].astype(x_XD.dtype)
        seen_XD = l2_norm(x_XD, self.cfg.rms_norm_eps) * scale_D * x_XD.shape[-1] ** -0.5
        logits_XE = self.router_logits(seen_XD)
        chosen_XC, weight_XC = top_k_softmax(logits_XE, self.cfg.top_k_experts, normalise=True)
        self.observe(logits_XE, chosen_XC)
        weight_XC *= self.w["expert_scale"].astype(jnp.float32)[chosen_XC]
        h_XD = self.norm(x_XD, "experts_norm")
        return self.back(self.experts(h_XD, chosen_XC, weight_XC), x_BTD)

    def per_layer(self, x_BTD):
        gate_BTI = self.linear("BTD,DI->BTI", x_BTD, "per_layer_gate")
        return self.linear("BTI,ID->BTD", self.gated(gate_BTI, self.layer["per_layer"]), "per_layer_out")

    @classmethod
    def empty_state(cls, cfg, layers, batch, length, dtype):
        dims = (cfg.head_dim, cfg.head_dim)
        return KV.empty(len(layers), batch, length, cfg.num_key_value_heads, dims, dtype)


class Global(Local):
    """A layer that attends to all of the past."""

    attends = "full_attention"

    @classmethod
    def empty_state(cls, cfg, layers, batch, length, dtype):
        dims = (cfg.global_head_dim, cfg.global_head_dim)
        return KV.empty(len(layers), batch, length, cfg.num_global_key_value_heads, dims, dtype)

    @classmethod
    def mixing_flops(cls, cfg, pairs, tokens):
        return 4 * cfg.num_attention_heads * cfg.global_head_dim * pairs


class Shared:
    """Attends to the keys and values of the last layer of its kind that has some."""

    wide = True

    def qkv(self, h_BTD):
        return self.q(h_BTD), *self.carry[self.attends]  # type: ignore[attr-defined]

    def rotate(self, q_BTNH, k_BSKH):
        return rope(q_BTNH, self.rotary()), k_BSKH  # type: ignore[attr-defined]

    def remember(self, k_BSKH, v_BSKH):
        return k_BSKH, v_BSKH

    @classmethod
    def empty_state(cls, cfg, layers, batch, length, dtype):
        return None


class SharedLocal(Shared, Local):
    pass


class SharedGlobal(Shared, Global):
    pass


class Gemma4(Gemma2):
    Config = Gemma4Config
    BLOCKS = {
        "local": Local,
        "global": Global,
        "shared_local": SharedLocal,
        "shared_global": SharedGlobal,
    }
    KEYS = {
        "hidden_activation": GELU,
        "use_bidirectional_attention": ("vision", None),  # images alone
        "sliding_window": None,
        "layer_types": None,
        "per_layer_config": None,
        "expert_intermediate_size": (None,),
    }

    @classmethod
    def config(cls, hf):
        kinds = hf.layer_types
        other = set(hf.per_layer_attributes or ()) - {"head_dim", "num_key_value_heads"}
        if other:
            raise UserError(f"config.json: per_layer_config sets {sorted(other)}, which is not implemented")
        if hf.num_kv_shared_layers and set(kinds[: -hf.num_kv_shared_layers]) != set(kinds):
            raise UserError(
                f"config.json: num_kv_shared_layers={hf.num_kv_shared_layers} leaves no layer of some of "
                f"layer_types={kinds} with keys and values of its own"
            )

        def of(name, kind):
            values = {getattr(hf.per_layer_config[i], name) for i in range(len(kinds)) if kinds[i] == kind}
            if len(values) > 1:
                raise UserError(f"config.json: {name} is {sorted(values)} in layers of type {kind!r}: one is")
            return values.pop() if values else None

        full = {name: of(name, "full_attention") for name in ("head_dim", "num_key_value_heads")}
        local = {name: of(name, "sliding_attention") or full[name] for name in full}
        return cls.Config.read(
            hf,
            global_head_dim=full["head_dim"],
            num_global_key_value_heads=full["num_key_value_heads"],
            **local,
            **cls.absent,
        )

    absent: ClassVar[dict] = {}

    @classmethod
    def layer_kinds(cls, cfg):
        kinds = ["global" if window is None else "local" for window in cfg.windows]
        return [kind if i < cfg.first_shared else "shared_" + kind for i, kind in enumerate(kinds)]

    @classmethod
    def block_rows(cls, cfg, kind):
        rows = NORMS | MLP | QK_NORM | SCALE | cls.biases(cfg)
        if kind.startswith("shared"):
            rows = {k: row for k, row in rows.items() if k not in ("k", "v", "k_norm", "k_bias", "v_bias")}
            if cfg.use_double_wide_mlp:
                rows |= {k: dataclasses.replace(MLP[k], axes=MLP[k].axes.replace("F", "UF")) for k in MLP}
        if kind.endswith("global"):
            alike = ("v", "v_bias") if cfg.attention_k_eq_v else ()
            rows = {
                k: dataclasses.replace(row, axes=row.axes.translate(GLOBAL_AXES))
                for k, row in rows.items()
                if k not in alike
            }
        rows |= PER_LAYER if cfg.hidden_size_per_layer_input else {}
        return rows | (EXPERTS if cfg.enable_moe_block else {})

    @classmethod
    def outer_rows(cls, cfg):
        return Decoder.outer_rows(cfg) | (PER_LAYER_INPUT if cfg.hidden_size_per_layer_input else {})

    @classmethod
    def others(cls, cfg):
        """Published files have keys and values in the layers that read another's: nothing reads them."""
        layers = "|".join(map(str, range(cfg.first_shared, cfg.num_hidden_layers)))
        unread = rf"model\.layers\.({layers})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\..*"
        return f"{super().others(cfg)}|{unread}" if layers else super().others(cfg)

    def rotary(self, positions_BT, segments_BT):
        cfg, kinds = self.cfg, dict(self.cfg.rope_parameters)
        dims = {"sliding_attention": cfg.head_dim, "full_attention": cfg.global_head_dim}
        return {
            name: self.rotary_table(kinds[name], positions_BT, segments_BT, dim)
            for name, dim in dims.items()
            if name in kinds
        }

    def carry(self, x_BTD, slots):
        """The keys and values that layers share, by kind of attention."""
        if not self.cfg.num_kv_shared_layers:
            return {}
        cfg = self.cfg
        sizes = {
            "sliding_attention": (cfg.num_key_value_heads, cfg.head_dim),
            "full_attention": (cfg.num_global_key_value_heads, cfg.global_head_dim),
        }
        return {
            name: (jnp.zeros((len(x_BTD), slots, *size), x_BTD.dtype),) * 2 for name, size in sizes.items()
        }

    def layer_data(self, w, x_BTD, tokens_BT):
        data = super().layer_data(w, x_BTD, tokens_BT)
        if not self.cfg.hidden_size_per_layer_input:
            return data
        D, I = x_BTD.shape[-1], self.cfg.hidden_size_per_layer_input  # noqa: E741
        dtype = x_BTD.dtype
        token_BTYI = lookup(w["per_layer_embed"], tokens_BT, dtype) * jnp.asarray(I**0.5, dtype)
        context_BTYI = einsum("BTD,DYI->BTYI", x_BTD, w["per_layer_in"]) * D**-0.5
        context_BTYI = rms_norm(context_BTYI, w["per_layer_in_norm"], self.cfg.rms_norm_eps, offset=0.0)
        return data | {"per_layer": jnp.moveaxis((context_BTYI + token_BTYI) * 2**-0.5, 2, 0)}


class Gemma4Unified(Gemma4):
    """The text part of the models without separate encoders: no look-ups in layers, no experts."""

    absent = dict(
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        enable_moe_block=False,
        num_experts=None,
        top_k_experts=None,
        moe_intermediate_size=None,
    )
