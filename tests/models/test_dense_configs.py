"""Keys that config.json of published dense models has, at small sizes: what is read, and what is refused."""

import pytest

from ftjax import models
from ftjax.errors import UserError

pytest.importorskip("transformers")

SMALL = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
SMALL |= dict(
    vocab_size=128, hidden_act="silu", initializer_range=0.02, use_cache=True, torch_dtype="bfloat16"
)
SMALL |= dict(attention_dropout=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_scaling=None)
SMALL |= dict(max_position_embeddings=4096, rope_theta=50000.0, tie_word_embeddings=True)
HYBRID = ["sliding_attention"] * 3 + ["full_attention"]
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=512, beta_fast=32.0, beta_slow=1.0)
GRANITE = dict(
    attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12, logits_scaling=10
)
GRANITE |= dict(residual_multiplier=0.22, rms_norm_eps=1e-05)
COHERE_2 = SMALL | dict(
    model_type="cohere2",
    attention_bias=False,
    cache_implementation="hybrid",
    head_dim=16,
    layer_norm_eps=1e-05,
    layer_switch=4,
    logit_scale=0.25,
    order_of_interleaved_layers="local_attn_first",
    position_embedding_type="rope_gptj",
    rotary_pct=1.0,
    sliding_window=1024,
    sliding_window_pattern=4,
    use_embedding_sharing=True,
    use_gated_activation=True,
    use_parallel_block=True,
    use_parallel_embedding=False,
    use_qk_norm=False,
)
GRANITE_4 = (
    SMALL
    | GRANITE
    | dict(
        model_type="granitemoehybrid",
        init_method="mup",
        layer_types=["attention"] * 4,
        mamba_chunk_size=256,
        mamba_conv_bias=True,
        mamba_d_conv=4,
        mamba_d_head=32,
        mamba_d_state=128,
        mamba_expand=2,
        mamba_n_groups=1,
        mamba_n_heads=4,
        mamba_proj_bias=False,
        normalization_function="rmsnorm",
        num_experts_per_tok=0,
        num_local_experts=0,
        output_router_logits=False,
        position_embedding_type="rope",
        router_aux_loss_coef=0.01,
        shared_intermediate_size=96,
    )
)
MINISTRAL_3 = {k: v for k, v in SMALL.items() if k not in ("rope_theta", "rope_scaling")} | dict(
    model_type="ministral3",
    head_dim=16,
    rms_norm_eps=1e-05,
    rope_parameters=YARN
    | dict(type="yarn", rope_theta=1e6, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1),
    sliding_window=None,
)
CONFIGS = {
    "olmo-2": SMALL | dict(model_type="olmo2", attention_bias=False, rms_norm_eps=1e-06),
    "olmo-3": SMALL
    | dict(model_type="olmo3", attention_bias=False, rms_norm_eps=1e-06, sliding_window=1024)
    | dict(layer_types=HYBRID, rope_scaling=YARN | dict(attention_factor=1.2079441541679836)),
    "granite-3": SMALL | GRANITE | dict(model_type="granite", mlp_bias=False),
    "granite-4-dense": GRANITE_4,
    "smollm3": SMALL
    | dict(model_type="smollm3", attention_bias=False, mlp_bias=False, rms_norm_eps=1e-06)
    | dict(layer_types=["full_attention"] * 4, max_window_layers=28, no_rope_layer_interval=4)
    | dict(no_rope_layers=[1, 1, 1, 0], pretraining_tp=2, sliding_window=None, use_sliding_window=False),
    "command-r": SMALL
    | dict(model_type="cohere", layer_norm_eps=1e-05, logit_scale=0.0625, attention_bias=False)
    | dict(model_max_length=131072, use_qk_norm=False, pretraining_tp=1),
    "command-r7b": COHERE_2,
    "mistral-small-3": dict(model_type="mistral3", image_token_index=10, spatial_merge_size=2)
    | dict(
        text_config=SMALL | dict(model_type="mistral", rms_norm_eps=1e-05, sliding_window=None, head_dim=16)
    ),
    "ministral-3": dict(model_type="mistral3", image_token_index=10, text_config=MINISTRAL_3),
    "devstral-2": MINISTRAL_3,
    "exaone-4": SMALL
    | dict(model_type="exaone4", head_dim=16, layer_types=HYBRID, rms_norm_eps=1e-05)
    | dict(sliding_window=1024, sliding_window_pattern="LLLG"),
    "seed-oss": SMALL
    | dict(model_type="seed_oss", attention_bias=True, attention_out_bias=False, attention_dropout=0.1)
    | dict(head_dim=16, mlp_bias=False, pretraining_tp=1, residual_dropout=0.1, rms_norm_eps=1e-06)
    | dict(rope_scaling=dict(rope_type="default")),
    "apertus": SMALL
    | dict(model_type="apertus", hidden_act="xielu", attention_bias=False, mlp_bias=False, post_norm=False)
    | dict(qk_norm=True, rms_norm_eps=1e-05),
    "hy-mt": SMALL
    | dict(model_type="hunyuan_v1_dense", attention_bias=False, attention_dropout=0.1, head_dim=16)
    | dict(add_classification_head=False, attention_head_dim=16, cla_share_factor=2, class_num=0)
    | dict(dense_list=[64, 0], im_end_id=5, im_newline_id=11, im_start_id=4, mask_init_id=12, mlp_bias=False)
    | dict(norm_type="rms", rms_norm_eps=1e-05, use_cla=False, use_qk_norm=True)
    | dict(rope_scaling=dict(alpha=1000.0, beta_fast=32, beta_slow=1, factor=1.0, type="dynamic")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_read(name):
    model = models.from_config(CONFIGS[name])
    assert model.table.count() > 100_000


REFUSED = {
    "mamba layers": (GRANITE_4 | dict(layer_types=["mamba"] * 3 + ["attention"]), "3 of 4 layers are Mamba"),
    "experts": (GRANITE_4 | dict(num_local_experts=8), "num_local_experts=8"),
    "norms that are not": (COHERE_2 | dict(use_qk_norm=True), "use_qk_norm=True"),
    "another pattern": (COHERE_2 | dict(layer_switch=2), "layer_switch=2"),
    "no scale of queries": (
        MINISTRAL_3 | dict(rope_parameters=YARN | dict(rope_theta=1e6)),
        "llama_4_scaling_beta",
    ),
    "alternating Mistral": (MINISTRAL_3 | dict(layer_types=HYBRID), "layer_types"),
    "shared keys and values": (CONFIGS["hy-mt"] | dict(use_cla=True), "use_cla=True"),
    "a bias nobody has": (CONFIGS["granite-3"] | dict(mlp_bias=True), "mlp_bias=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_compute_something_else_is_refused(name):
    config, says = REFUSED[name]
    with pytest.raises(UserError, match=says):
        models.from_config(config)
