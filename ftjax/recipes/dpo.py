"""ftjax dpo CONFIG.yaml: direct preference optimisation from pairs of answers."""

from ftjax.objectives.preference import dpo_loss
from ftjax.recipes import program


def make_loss(setup: program.Setup):
    return dpo_loss(
        setup.model,
        setup.params_of,
        beta=setup.config.dpo.beta,
        label_smoothing=setup.config.dpo.label_smoothing,
        chunk=setup.config.train.loss_chunk,
        frozen_head=setup.frozen_head,
        router=setup.router,
    )


def main(argv: list[str]) -> int:
    from ftjax.recipes import training  # slow to import, and not needed to plan

    return training.main(argv, "dpo", make_loss, preference=True)
