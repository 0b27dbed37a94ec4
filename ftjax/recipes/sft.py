"""ftjax sft CONFIG.yaml: supervised fine-tuning and continued pre-training."""

from ftjax.objectives.sft import sft_loss
from ftjax.recipes import program


def make_loss(setup: program.Setup):
    return sft_loss(
        setup.model,
        setup.params_of,
        chunk=setup.config.train.loss_chunk,
        frozen_head=setup.frozen_head,
        label_smoothing=setup.config.train.label_smoothing,
        z_loss_coef=setup.config.train.z_loss_coef,
        router=setup.router,
    )


def main(argv: list[str]) -> int:
    from ftjax.recipes import training  # slow to import, and not needed to plan

    return training.main(argv, "sft", make_loss)
