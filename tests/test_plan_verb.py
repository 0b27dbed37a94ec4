"""ftjax plan, as people and programs call it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tpu

from ftjax import cli, plan, prices, published
from ftjax.errors import UserError
from ftjax.recipes import planning

pytestmark = pytest.mark.fast

LLAMA = ["model=meta-llama/Llama-3.1-8B", "train.batch_size=16", "train.remat=mlp"]
TINY = str(pathlib.Path(__file__).parent / "assets" / "tiny_model")


def call(*words, capsys) -> tuple[int, str]:
    code = cli.main(["plan", *words])
    return code, capsys.readouterr().out


def found(*words, capsys) -> dict:
    return json.loads(call(*words, "--json", capsys=capsys)[1])


def test_text(capsys):
    code, out = call(*LLAMA, "--on", "v5e-16", "--quick", "--tokens", "10000000", capsys=capsys)
    assert code == 0
    for part in (
        "Llama-3.1-8B (8.03 B), LoRA r=16, on v5e-16: 16 chips, mesh fsdp 16, 16 rows of 2,048 tokens",
        "It should fit",
        "weights                   0.94 GiB",
        "all-gather",
        "bound by computation",
        "seconds = max(compute, network)",
        "306 steps",
        "at $1.20 a chip and hour (us-central1, 2026-11-25, ",
    ):
        assert part in out, part


@pytest.mark.parametrize(
    "on, fits", [("v5e-8", True), ("v5p-8", True), ("v6e-1", False), ("h100x8", True), ("l4", False)]
)
def test_devices(on, fits, capsys):
    one = found(*LLAMA, "--on", on, "--quick", capsys=capsys)
    assert one["fits"] is fits and one["on"] == on and one["how"] == "arithmetic"
    memory = one["memory"]
    parts = ("weights", "adapters", "optimiser", "batch", "activations", "temporaries", "results", "code")
    assert memory["total"] == pytest.approx(sum(memory[x] for x in parts))
    assert 0 < one["mfu"] < 0.75 and one["tokens_per_second"] > 0 and one["hours"] is None
    if not fits:
        assert one["changes"] or one["larger"]


def test_money(tmp_path, capsys, monkeypatch):
    """Prices: ours, then the user's, then the file that is given; none where none is published."""
    words = [*LLAMA, "--quick", "--tokens", "1000000"]
    one = found(*words, "--on", "v5e-16", capsys=capsys)
    assert one["dollars"] == pytest.approx(one["hours"] * 16 * 1.2) and one["steps"] == 31
    assert found(*words, "--on", "v5e-16", "--spot", capsys=capsys)["dollars_per_chip_hour"] < 1
    none = found(*words, "--on", "h200", "train.remat=full", capsys=capsys)
    assert none["dollars"] is None and none["hours"] > 0
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "ftjax").mkdir()
    (tmp_path / "ftjax" / "prices.yaml").write_text(
        "h200: {on_demand: 4, looked_up: 2026-01-01, source: us}\n"
    )
    mine = found(*words, "--on", "h200", "train.remat=full", capsys=capsys)
    assert mine["dollars_per_chip_hour"] == 4 and mine["price"] == "2026-01-01, us"
    (tmp_path / "p.yaml").write_text("h200: 5\n")
    given = found(*words, "--on", "h200", "--prices", str(tmp_path / "p.yaml"), capsys=capsys)
    assert given["dollars_per_chip_hour"] == 5
    (tmp_path / "p.yaml").write_text("h200: {per_hour: 5}\n")
    with pytest.raises(UserError, match="some of on_demand, spot"):
        prices.load(tmp_path / "p.yaml")
    (tmp_path / "p.yaml").write_text("v7x: {on_demand: 12}\n")
    assert prices.load(tmp_path / "p.yaml")["tpu7x"].on_demand == 12
    (tmp_path / "p.yaml").write_text("v5e-16: 1\n")
    with pytest.raises(UserError, match="v5e-16: no such accelerator"):
        prices.load(tmp_path / "p.yaml")


def test_what_to_change(capsys):
    code, out = call(*LLAMA, "--on", "v5e-4", "--quick", "train.remat=none", capsys=capsys)
    assert code == 3
    assert "IT SHOULD NOT FIT" in out and "train.remat=full" in out and "or on v5e-16, as it is" in out
    change = found(*LLAMA, "--on", "v5e-4", "--quick", "train.remat=none", capsys=capsys)["changes"][0]
    assert found(*LLAMA, "--on", "v5e-4", "--quick", *change.split(), capsys=capsys)["fits"]


def test_preferences(tmp_path, capsys):
    """DPO goes through the frozen model, too, and full tuning holds it beside the one that is trained."""
    (tmp_path / "c.yaml").write_text("model: Qwen/Qwen3-8B\ndpo: {beta: 0.1}\n")
    words = ["--on", "v5p-8", "--quick", "train.batch_size=8"]
    sft = found("model=Qwen/Qwen3-8B", *words, capsys=capsys)
    dpo = found(str(tmp_path / "c.yaml"), *words, capsys=capsys)
    assert 1.4 < dpo["model_flops"] / sft["model_flops"] < 1.6
    both = [
        found(*w, *words, "lora=null", capsys=capsys)["memory"]["weights"]
        for w in (["model=Qwen/Qwen3-8B"], [str(tmp_path / "c.yaml")])
    ]
    assert both[1] / both[0] == pytest.approx(1.5, rel=0.01)


def test_search_and_fit(capsys):
    best = found(*LLAMA, "--on", "v5e-16", "--quick", "--search", capsys=capsys)
    assert best["fits"] and best["tokens_per_second"] == max(
        best["tokens_per_second"],
        found(*LLAMA, "--on", "v5e-16", "--quick", capsys=capsys)["tokens_per_second"],
    )
    again = [f"{k}={v}" for k, v in best["settings"].items()]
    same = found(*LLAMA, *again, "--on", "v5e-16", "--quick", capsys=capsys)
    assert same["memory"]["total"] == pytest.approx(best["memory"]["total"])
    mixtral = ["model=mistralai/Mixtral-8x7B-v0.1", "train.batch_size=16", "mesh.ep=4"]
    best = found(*mixtral, "--on", "v5p-32", "--quick", "--search", capsys=capsys)
    assert best["fits"] and best["settings"]["mesh.ep"] == 4  # what the config says stays


def test_the_smallest_slice(capsys):
    """Whatever count of devices the mesh was meant for; a kind that has none is said; where the batch grows,
    its hours are those of a plan of that batch."""
    words = [*LLAMA, "--quick", "train.remat=full", "--tokens", "10M"]
    fit = found(*words, "mesh.fsdp=16", "--fit", "--on", "v5e,v5p", capsys=capsys)
    assert [one["on"] for one in fit] == ["v5e-4", "v5p-8"] and fit[0]["settings"] == {"mesh.fsdp": -1}
    large = ["model=meta-llama/Llama-3.1-70B", "train.batch_size=8", *words[2:]]
    code, out = call(*large, "--fit", "--on", "l4,v5e,v5p", capsys=capsys)
    assert code == 0 and "v5e-32" in out and "train.batch_size=32" in out
    grown = next(one for one in found(*large, "--fit", capsys=capsys) if one["on"] == "v5e-32")
    same = found(*large, "train.batch_size=32", "--on", "v5e-32", capsys=capsys)
    assert grown["hours"] == same["hours"] and grown["dollars"] == same["dollars"]
    none = call(*large, "lora=null", "--fit", "--on", "l4", "data.max_length=131072", capsys=capsys)
    assert none[0] == 3 and "none of up to 256 chips" in none[1]


def test_what_fits_with_several_changes(capsys):
    """Where no setting does alone, and what a larger machine would still need."""
    words = ["model=meta-llama/Llama-3.1-8B", "train.batch_size=32", "--on", "v5e-1", "--quick"]
    change = found(*words, capsys=capsys)["changes"][0]
    assert "nf4" in change and "microbatches" in change
    assert found(*words, *change.split(), capsys=capsys)["fits"]
    full = ["model=meta-llama/Llama-3.1-70B", "lora=null", "--on", "h100x8", "--quick"]
    larger = found(*full, capsys=capsys)["larger"][0]
    again = [f"{k}={v}" for k, v in larger["settings"].items()]
    assert larger["on"] == "2xh100x8" and "optim.state_dtype=bfloat16" in again
    assert found(*full, *again, "--on", "2xh100x8", capsys=capsys)["fits"]


def test_nodes_are_joined_by_a_network(capsys):
    one = found(*LLAMA, "--on", "l4x16", "--quick", capsys=capsys)
    assert one["seconds_by_part"]["network"] > 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["--on", "v5e-12"], "no such slice"),
        (["--on", "h10x8"], "did you mean h100"),
        ([], "needs --on"),
        (["--on", "v5e-16", "mesh.tp=3"], "does not divide"),
        (["--on", "v5e-16", "train.batch_size=8"], "microbatch"),
        (["--on", "v5e-16", "model=meta-llama/Llama-3.1-9B"], "Llama-3.1-8B"),
        (["--on", "v5e-16", "--tokens", "0"], "at least one"),
        (["--on", "v5e-16", "--tokens", "many"], "like 50000000, 5e7 or 50M"),
        (["--on", "v5e:32x32"], "no such slice"),
        (["--on", "v5e:2x3"], "no such slice"),
        (["--fit", "--on", "v5e-16"], "a kind, without a count"),
        (["--on", "v5e-16", "optim.lrr=1"], "optim.lr"),
    ],
)
def test_errors(words, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["plan", *LLAMA, "--quick", *words]) == 2
    assert said in capsys.readouterr().err


def test_quick_is_quick():
    """Under two seconds of a core, the interpreter's start and all imports with it; on a machine that is
    slow, or busy, as many more as importing jax takes more than half a second there."""
    used = (
        "import resource; u = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('seconds', u.ru_utime + u.ru_stime)"
    )
    code = (
        "import sys; from ftjax import cli\n"
        f"cli.main(['plan', *{LLAMA!r}, '--on', 'v5e-16', '--quick'])\n"
        "heavy = {'transformers', 'grain', 'orbax', 'jax.experimental.pallas', 'ftjax.recipes.training'}\n"
        "assert not heavy & set(sys.modules)\n"
    )

    def once(code: str) -> float:
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", code + used], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.rpartition("seconds ")[2])

    slow = max(1.0, min(once("import jax\n") for _ in range(2)) / 0.5)
    assert min(once(code) for _ in range(2)) < 2.0 * slow


def test_a_folder_with_only_a_config(tmp_path, capsys, monkeypatch):
    """Neither weights nor a tokenizer; and it is read again without transformers."""
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m").mkdir()
    raw = json.loads((pathlib.Path(TINY) / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    words = [f"model={tmp_path / 'm'}", "--on", "v5e-1", "--quick", "data.max_length=128"]
    first = found(*words, capsys=capsys)
    monkeypatch.setattr(published.models, "from_config", None)
    assert found(*words, capsys=capsys) == first


def test_published_configs_are_as_transformers_reads_them():
    counts = {  # parameters as the models' pages have them
        "meta-llama/Llama-3.1-70B": 70_553_706_496,
        "Qwen/Qwen3-32B": 32_762_123_264,
        "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    }
    for name, count in counts.items():
        assert published.read(published.config(name)).table.count() == count
    from ftjax import models

    for one in published.table():
        assert published.read(one["config"]).config == models.from_config(one["config"]).config


def test_data_is_counted(tmp_path, capsys):
    """By its packing plan with the model's tokenizer; in a hurry by the size of its file."""
    text = [{"text": "the quick brown fox jumps over the lazy dog " * 4} for _ in range(50)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, text)))
    words = [
        f"model={TINY}",
        f"data.train={tmp_path / 't.jsonl'}",
        "data.max_length=256",
        "train.batch_size=2",
    ]
    run = planning.read_run([*words, f"data.cache_dir={tmp_path / 'cache'}"])
    counted = run.data
    assert counted.work(run.cfg) is not None and counted.steps(run.cfg) and "tokens in" in counted.said
    hurried = planning.count_data(run.cfg, None, quick=True)
    assert hurried.steps(run.cfg) and "by its" in hurried.said
    assert planning.count_data(run.cfg, 512 * 10, quick=True).steps(run.cfg) == 10


@tpu.needs_libtpu
def test_compiled(capsys):
    """A real compile of a tiny run: the parts are the compiler's, and its collectives are counted."""
    words = [f"model={TINY}", "data.max_length=256", "train.batch_size=4", "lora.r=4"]
    with tpu.one_at_a_time():
        one = found(*words, "--on", "v5e-4", "--tokens", "100000", capsys=capsys)
    assert one["how"] == "compiled" and one["fits"] and one["compile_seconds"] > 0
    assert one["collectives"]["all-gather"]["count"] >= 2 and one["memory"]["temporaries"] > 0
    assert one["steps"] == 98
    quick = found(*words, "--on", "v5e-4", "--quick", capsys=capsys)
    assert one["memory"]["weights"] == quick["memory"]["weights"]


@tpu.needs_libtpu
def test_slices_are_libtpus():
    from ftjax import chips

    for name in ("v5e-1", "v4-8", "v5p-8", "2xv5e-4", "tpu7x-8", "v6e-16"):
        on = chips.parse(name)
        devices = plan.topology(on)
        assert len(devices) == on.devices
        assert chips.flops.device(devices[0].device_kind) == on.chip.peak
    with pytest.raises(UserError, match="is no TPU slice"):
        plan.topology(chips.Slice(chips.CHIPS["v5e"], 9, 1, (3, 3)))
