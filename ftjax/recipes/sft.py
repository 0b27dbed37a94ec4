"""ftjax sft CONFIG.yaml: supervised fine-tuning and continued pre-training."""

from ftjax.objectives.sft import sft_loss
from ftjax.recipes import training


def make_loss(setup: training.Setup):
    return sft_loss(
        setup.model,
        setup.params_of,
        chunk=setup.config.train.loss_chunk,
        frozen_head=setup.frozen_head,
        router=setup.router,
    )


def main(argv: list[str]) -> int:
    return training.main(argv, "sft", make_loss)
