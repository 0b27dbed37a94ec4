"""Names of slices and GPUs, as they are rented."""

import pytest

from ftjax import chips, flops
from ftjax.errors import UserError

pytestmark = pytest.mark.fast

NAMES = {  # name -> (our name, chips in all, slices, what libtpu is asked for, jax devices)
    "v5e-16": ("v5e-16", 16, 1, "v5e:4x4", 16),
    "v5litepod-8": ("v5e-8", 8, 1, "v5e:2x4", 8),
    "v6e-256": ("v6e-256", 256, 1, "v6e:16x16", 256),
    "v5e:4x8": ("v5e-32", 32, 1, "v5e:4x8", 32),
    "v5p-8": ("v5p-8", 4, 1, "v5p:2x2x1", 4),
    "v5p-512": ("v5p-512", 256, 1, "v5p:4x8x8", 256),
    "v4-32": ("v4-32", 16, 1, "v4:2x2x4", 16),
    "tpu-v4-8": ("v4-8", 4, 1, "v4:2x2x1", 4),
    "2xv5e-256": ("2xv5e-256", 512, 2, "v5e:16x16", 512),
    "tpu7x-16": ("tpu7x-16", 8, 1, "tpu7x:2x2x2", 16),
    "ironwood-8": ("tpu7x-8", 4, 1, "tpu7x:2x2x1", 8),
    "H100x8": ("h100x8", 8, 1, None, 8),
    "8xh100": ("h100x8", 8, 1, None, 8),
    "h100x16": ("2xh100x8", 16, 2, None, 16),
    "2xh100x8": ("2xh100x8", 16, 2, None, 16),
    "a100": ("a100", 1, 1, None, 1),
    "a100-40x4": ("a100-40x4", 4, 1, None, 4),
    "l4": ("l4", 1, 1, None, 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    found = chips.parse(name)
    topology = found.topology if found.is_tpu else None
    assert (found.name, found.total, found.slices, topology, found.devices) == NAMES[name]
    assert chips.parse(found.name) == found


WRONG = {
    "v5e-12": "no such slice: v5e comes as v5e-1, v5e-4",
    "v5p-4": "two TensorCores a chip are counted",
    "v5e": "how many",
    "v5e:4x4x4": "has 2 sizes",
    "h10x8": "did you mean h100",
    "v9-8": "no such accelerator",
    "h100x12": "no whole nodes of 8",
    "0xv5e-8": "at least one",
    "tpu": "no such accelerator",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_exist(name):
    with pytest.raises(UserError, match=WRONG[name]):
        chips.parse(name)


def test_every_chip_has_peaks_and_sources():
    for chip in chips.CHIPS.values():
        assert flops.device(chip.kind) is chip.peak and chip.source
        assert list(chips.sizes(chip))[0].total >= 1
    assert [s.name for s in chips.sizes(chips.CHIPS["v5p"], 32)] == ["v5p-8", "v5p-16", "v5p-32", "v5p-64"]
