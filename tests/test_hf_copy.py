"""Copies into and out of a checkpoint's layout, of sizes that do not fit their blocks, and what is finite."""

import ml_dtypes
import numpy as np
import pytest

from ftjax import files, hf_export

pytestmark = pytest.mark.fast
FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


@pytest.mark.parametrize(
    "shape, split", [((700, 530), 1), ((3, 130, 601), 2), ((601, 3, 130), 1), ((1, 5), 1)]
)
@pytest.mark.parametrize("stored, wanted", [(x, x) for x in FLOATS] + [("bfloat16", "float32")])
def test_a_transposing_copy_is_numpys(shape, split, stored, wanted):
    lies = shape[split:] + shape[:split]
    x = np.random.default_rng(0).standard_normal(lies).astype(dtype_of(stored))
    x = x.transpose(*range(len(shape) - split, len(shape)), *range(len(shape) - split))
    out = np.zeros(shape, dtype_of(wanted))
    files.copy(out, x, split)
    np.testing.assert_array_equal(out, x.astype(out.dtype))


@pytest.mark.parametrize("band", [1, 3000, 1 << 23])
def test_transposed_tensors_are_written_in_bands(tmp_path, band, monkeypatch):
    from safetensors.numpy import load_file

    monkeypatch.setattr(files, "BAND", band)
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.standard_normal((70, 33), np.float32).T,
        "experts": rng.standard_normal((3, 40, 21), np.float32).transpose(0, 2, 1),
        "plain": rng.standard_normal((5, 7), np.float32),
        "vector": rng.standard_normal(20, np.float32)[::2],
        "scalar": np.float32(3).reshape(()),
        "another": rng.standard_normal((90, 44)).astype(np.float16).T,
    }
    entries = {n: (x.shape, x.dtype) for n, x in tensors.items()}
    files.write_safetensors(tmp_path / "a.safetensors", entries, tensors.__getitem__)
    read = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(read[name], x, err_msg=name)


def test_an_error_while_a_tensor_is_made_is_raised(tmp_path):
    def tensor(name):
        raise ValueError(name)

    with pytest.raises(ValueError, match="weight"):
        files.write_safetensors(tmp_path / "a.safetensors", {"weight": ((2,), np.dtype("f4"))}, tensor)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_finite_by_the_bits_is_finite(name):
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype_of(name))
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(every)
    assert hf_export._finite(every[finite]) and not finite.all()
    for bad in every[~finite]:
        assert not hf_export._finite(np.array([0, bad, 1], every.dtype))
