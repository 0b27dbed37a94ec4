"""A mixture's router losses: the same however a batch is cut where they are sums, and as the formulas say."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ftjax import cli, files, hf, models, train, weights
from ftjax.errors import UserError
from ftjax.objectives.router import RouterLoss
from ftjax.objectives.sft import sft_loss

pytestmark = pytest.mark.fast


def moe(**changes):
    experts = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02)
    return models.from_config(
        tiny.CONFIG | {"model_type": "mixtral", "num_hidden_layers": 2} | experts | changes
    )


def test_coefficients_come_from_the_config_where_the_router_trains():
    assert RouterLoss.of(moe(), None, 0.0, router_trains=True) == RouterLoss(0.02, 0.0)
    assert RouterLoss.of(moe(), None, 0.1, router_trains=False) == RouterLoss(0.0, 0.1)
    assert RouterLoss.of(moe(), 0.5, 0.0, router_trains=False) == RouterLoss(0.5, 0.0)
    assert RouterLoss.of(tiny.model(), None, 0.0, router_trains=True) == RouterLoss()
    with pytest.raises(UserError, match="router_z_loss_coef=0.1 has no effect: a llama model has no router"):
        RouterLoss.of(tiny.model(), None, 0.1, router_trains=True)


def test_the_step_adds_them_and_padding_does_not_count():
    model = moe()
    params = weights.init(jax.random.key(0), model.table)
    rng = np.random.default_rng(0)
    T = 12
    batch = {
        "tokens": rng.integers(0, 90, (2, T)).astype(np.int32),
        "segments": np.array([[1] * T, [1] * 7 + [0] * (T - 7)], np.int32),
        "positions": np.array([np.arange(T), [*range(7), *[0] * (T - 7)]], np.int32),
    }
    batch["loss_weight"] = (batch["segments"] > 0).astype(np.float32)
    params_of = lambda trainable, frozen, rng: trainable  # noqa: E731

    def run(router, batch):
        loss = sft_loss(model, params_of, chunk=8, frozen_head=False, router=router)
        return jax.jit(loss)(params, None, batch)

    plain, sums = run(RouterLoss(), batch)
    assert set(sums) == {"loss", "weight"}
    total, sums = run(RouterLoss(0.3, 0.07), batch)
    weight = sums["weight"]
    np.testing.assert_allclose(sums["loss"], plain, rtol=1e-6)
    added = 0.3 * sums["router_balance"] + 0.07 * sums["router_z"]
    np.testing.assert_allclose(total, plain + added, rtol=1e-6)
    # by hand: of the live tokens of both layers together
    _, _, aux = model(params, batch["tokens"], batch["positions"], batch["segments"])
    assert aux["counts"].shape == (2, 4) and aux["tokens"].tolist() == [T + 7] * 2
    f = aux["counts"].sum(0) / (2 * (T + 7))
    p = aux["probs"].sum(0) / (2 * (T + 7))
    np.testing.assert_allclose(sums["router_balance"] / weight, 4 * np.sum(f * p), rtol=1e-6)
    changed = batch | {"tokens": np.where(batch["segments"] > 0, batch["tokens"], 5)}
    np.testing.assert_allclose(run(RouterLoss(0.3, 0.07), changed)[0], total, rtol=1e-6)


def test_balance_is_learnt():
    """A router that sends everything to two experts spreads after some steps of the balance loss alone."""
    model = moe()
    params = weights.init(jax.random.key(0), model.table)
    params["layers"]["router"] = params["layers"]["router"].at[:, :, :2].add(0.5)
    tokens = np.random.default_rng(0).integers(0, 90, (4, 16)).astype(np.int32)
    positions, segments = np.tile(np.arange(16, dtype=np.int32), (4, 1)), np.ones((4, 16), np.int32)

    @jax.jit
    def step(router):
        def loss(router):
            tree = params | {"layers": params["layers"] | {"router": router}}
            aux = model(tree, tokens, positions, segments)[2]
            return RouterLoss(1.0)(aux, jnp.float32(1))[0]

        value, grad = jax.value_and_grad(loss)(router)
        return value, router - 0.5 * grad

    router, values = params["layers"]["router"], []
    for _ in range(30):
        value, router = step(router)
        values.append(float(value))
    assert values[0] > 2.1 and abs(values[-1] - 2.0) < 0.05  # even routing gives k = 2


def test_options_are_checked():
    with pytest.raises(UserError, match=r"train.router_z_loss_coef=-1: 0 \(off\) or more"):
        train.TrainOptions(router_z_loss_coef=-1)


def test_a_run_of_a_mixture(tmp_path):
    """Experts and router adapted with DoRA: the router's loss is reported, and what PEFT cannot hold is said
    before the first step and kept in our own format."""
    base = pathlib.Path(__file__).parent / "assets" / "tiny_model"
    tiny_config = json.loads((base / "config.json").read_text())
    model = moe(vocab_size=tiny_config["vocab_size"])
    flat = weights.flatten(weights.init(jax.random.key(0), model.table))
    tensors = {n: x for path in flat for n, x in weights.to_hf(model.table, path, flat[path]).items()}
    folder = shutil.copytree(base, tmp_path / "moe")
    kept = {k: v for k, v in tiny_config.items() if k.endswith("_token_id")}
    changes = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    config = tiny.CONFIG | changes | kept | {"vocab_size": tiny_config["vocab_size"]}
    files.write_json(folder / "config.json", config)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    entries = {n: (x.shape, x.dtype) for n, x in tensors.items()}
    files.write_safetensors(folder / "model.safetensors", entries, tensors.__getitem__)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "ran and saw"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    run = tmp_path / "run"
    settings = dict(
        model=folder, output=run, lora="{r: 2, use_dora: true, target_modules: [w1, w2, w3, gate]}",
        train="{max_steps: 2, batch_size: 4, dtype: float32, router_aux_loss_coef: 0.1}",
        mesh="{fsdp: 4, tp: 2}", report="{tensorboard: false}",
        data=f"{{train: {tmp_path / 'train.jsonl'}, max_length: 64, cache_dir: {tmp_path / 'cache'}}}",
    )  # fmt: skip
    assert cli.main(["sft", *(f"{k}={v}" for k, v in settings.items())]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("in ftjax's own format, not PEFT's" in line.get("message", "") for line in lines)
    assert any(line.get("router_balance", 0) >= 1.9 for line in lines)  # even routing of two gives 2
    assert cli.main(["export", str(run), "--for", "vllm"]) == 0
    assert ".experts.3.w2.weight" in " ".join(hf.open_model(run / "export/vllm").names())  # merged
