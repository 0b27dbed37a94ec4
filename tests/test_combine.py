"""ftjax combine on adapters and runs of one base."""

import numpy as np
import pytest
import test_hf
import tiny

from ftjax import cli, hf, lora, models, peft, weights

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, model): base/, an adapter in one/ and a run with another in run/."""
    root = tmp_path_factory.mktemp("combine")
    test_hf.make(root / "base")
    source = hf.open_model(root / "base")
    model = models.from_config(source.config)
    (root / "run").mkdir()
    for folder, config, seed in (
        ("one", lora.LoraConfig(r=4, lora_alpha=7), 1),
        ("run/adapter", lora.LoraConfig(r=2, lora_alpha=5, target_modules=("q_proj", "up_proj")), 2),
    ):
        plan = lora.plan(config, model.table)
        rng = np.random.default_rng(seed)
        shapes = {path: x.shape for path, x in weights.flatten(lora.abstract(plan, model.table)).items()}
        tree = weights.unflatten({p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()})
        peft.save(root / folder, plan, tree, config, model.table, source)
    return root, model


def merged(root, model, *folders):
    """{path: what these adapters add to the base, summed with their weights}."""
    params = hf.load_params(hf.open_model(root / "base"), model)
    total = {}
    for folder, weight in folders:
        _, plan, tree = peft.load(folder, model)
        flat = weights.flatten(lora.merge(lora.attach(params, tree, plan)))
        for path, x in weights.flatten(params).items():
            total[path] = total.get(path, 0) + weight * (np.asarray(flat[path]) - np.asarray(x))
    return total


def test_cat_is_the_sum_of_the_updates(two, tmp_path, capsys):
    root, model = two
    argv = [
        "combine",
        f"{root}/one=0.5",
        f"{root}/run=-2",
        "--method",
        "cat",
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main(argv) == 0
    assert "cat of 0.5 × " in capsys.readouterr().out
    have = merged(root, model, (tmp_path / "out", 1.0))
    want = merged(root, model, (root / "one", 0.5), (root / "run/adapter", -2.0))
    for path, x in want.items():
        np.testing.assert_allclose(have[path], x, atol=2e-5 * max(np.abs(x).max(), 1e-3))
    assert cli.main(argv) == 2 and "exists; overwrite replaces it" in capsys.readouterr().err


def test_svd_keeps_the_rank_that_is_asked_for(two, tmp_path):
    root, model = two
    out = str(tmp_path / "out")
    assert cli.main(["combine", f"{root}/one", f"{root}/run", "--rank", "3", "--output", out]) == 0
    assert {one.rank for one in peft.load(out, model)[1].values()} == {3}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{root}/one"], "two adapters at least"),
        (["{root}/one", "{root}/base"], "neither an adapter"),
        (
            ["{root}/one", "{root}/run", "--method", "linear"],
            "model.layers.0.self_attn.q_proj have ranks [4, 2]",
        ),
        (
            ["{root}/one", "{root}/run", "--method", "ties", "--density", "0.5"],
            "(one that began by PiSSA or OLoRA has twice its r); cat, svd and ties_svd take any",
        ),
    ],
)
def test_what_is_wrong_is_said(two, tmp_path, capsys, argv, said):
    argv = [x.format(root=two[0]) for x in argv]
    assert cli.main(["combine", *argv, "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_of_another_base(two, tmp_path, capsys):
    root, _ = two
    test_hf.make(tmp_path / "other", tiny.base() | {"final_norm": tiny.base()["final_norm"] + 1})
    argv = ["combine", f"{root}/one", f"{root}/run", "--base", str(tmp_path / "other"), "--output", "x"]
    assert cli.main(argv) == 2
    assert "other" in capsys.readouterr().err
