"""Qwen3.5's published files hold a layer's experts in one tensor; transformers saves them apart."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the files are made with torch, which is not installed")
from test_parity import close, make_case

from ftjax import files, hf, hf_export, models


def test_experts_in_one_tensor(tmp_path_factory, tmp_path):
    case = make_case("qwen3_5_moe_text", tmp_path_factory.getbasetemp())
    source, tensors = case.source, {}
    experts = sorted({n.rpartition(".experts.")[0] for n in source.names() if ".experts." in n})
    count = case.model.config.sizes["E"]
    for name in source.names():
        if ".experts." not in name:
            tensors[name] = np.array(source.get(name))
    for layer in experts:
        get = lambda e, part, layer=layer: np.array(source.get(f"{layer}.experts.{e}.{part}.weight"))  # noqa: E731
        both = [np.concatenate([get(e, "gate_proj"), get(e, "up_proj")]) for e in range(count)]
        tensors[f"{layer}.experts.gate_up_proj"] = np.stack(both)
        tensors[f"{layer}.experts.down_proj"] = np.stack([get(e, "down_proj") for e in range(count)])
    folder = tmp_path / "fused"
    folder.mkdir()
    # as the text part of the published multimodal files
    names = {f"model.language_model.{n[6:]}" if n.startswith("model.") else n: x for n, x in tensors.items()}
    files.write_json(folder / "config.json", {"model_type": "qwen3_5_moe", "text_config": source.config})
    entries = {n: (x.shape, x.dtype) for n, x in names.items()}
    files.write_safetensors(folder / "model.safetensors", entries, names.__getitem__)
    opened = hf.open_model(folder)
    model = models.from_config(opened.config)
    params = hf.load_params(opened, model)
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    close(case.forward(params, case.tokens, *case.plain), case.logits)
    hf_export.save_model(tmp_path / "out", model, params, opened)
    again = hf.open_model(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(again, model), params)
