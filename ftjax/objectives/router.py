"""What a mixture of experts adds to a loss so that its router spreads tokens over the experts."""

import dataclasses

import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.models import Model
from ftjax.ops import balance_loss, z_loss


@dataclasses.dataclass(frozen=True)
class RouterLoss:
    """Coefficients of the balance loss and of the z-loss; both 0 for a dense model."""

    balance: float = 0.0
    z: float = 0.0

    @classmethod
    def of(cls, model: Model, balance: float | None, z: float, router_trains: bool) -> "RouterLoss":
        """As set; where `balance` is None that of the model's config.json (router_aux_loss_coef) if the
        router is trained, else 0. UserError where a dense model is given one."""
        dense = not any(row.role == "router" for row in model.table.rows.values())
        if dense and (balance or z):
            name = "router_aux_loss_coef" if balance else "router_z_loss_coef"
            kind = model.config.model_type
            raise UserError(f"train.{name}={balance or z} has no effect: a {kind} model has no router")
        if balance is None:
            balance = getattr(model.config, "router_aux_loss_coef", None) if router_trains else None
        return cls(balance or 0.0, z)

    def __call__(self, aux, weight):
        """(what to add to the summed loss, the sums to report): each loss times `weight`, the microbatch's
        share of the denominator.

        They are means over the microbatch's live tokens on all devices: a batch cut into microbatches gets
        the mean of their losses, which is not quite the loss of the whole."""
        if not aux or not (self.balance or self.z):
            return jnp.float32(0), {}
        losses = {"router_balance": balance_loss(aux), "router_z": z_loss(aux)}
        added = self.balance * losses["router_balance"] + self.z * losses["router_z"]
        return added * weight, {name: loss * weight for name, loss in losses.items()}


NO_ROUTER = RouterLoss()
