"""Adadelta: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adadelta(
    p: Tensor, g: Tensor, v: Tensor, a: Tensor, *, t: float, lr: float, rho: float, eps: float, weight_decay: float
) -> Tensor:
    """Update the means v of g^2 and a of delta^2 in place and return u of p <- p - u, by torch alone."""
    g = g + weight_decay * p if weight_decay else g
    v.mul_(rho).addcmul_(g, g, value=1 - rho)
    delta = (a + eps).sqrt() / (v + eps).sqrt() * g
    a.mul_(rho).addcmul_(delta, delta, value=1 - rho)
    return lr * delta


STATES = ("square_avg", "acc_delta")
ADADELTA = Rule("adadelta", STATES, ("lr", "rho", "eps", "weight_decay"), False, adadelta, positive=STATES)


class Adadelta(FusedOptimizer):
    r"""Adadelta: a drop-in replacement for torch.optim.Adadelta.

    .. math::
        g \leftarrow g + \lambda p \quad v \leftarrow \rho v + (1-\rho) g^2 \quad
        \Delta = \frac{\sqrt{a + \epsilon}}{\sqrt{v + \epsilon}} g \quad
        a \leftarrow \rho a + (1-\rho) \Delta^2 \quad p \leftarrow p - \gamma \Delta

    Steps have the scale of the steps before them, so there is no learning rate to tune: lr stays at 1. Use it where
    nobody can tune, or to reproduce older work; it starts slowly, and how slowly depends on eps.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: factor of the step, >= 0; a float or a tensor of one element.
        rho: decay of both means of squares, in [0, 1].
        eps: added to the means under both roots, >= 0; the first step is at most sqrt(eps / (1 - rho)), times lr.
        weight_decay: L2 penalty, added to the gradient, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`; torch's class has no `fused`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Zeiler 2012, Alg. 1 (arXiv:1212.5701); defaults as in torch.optim.Adadelta.
    """

    rules = (ADADELTA,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        if fused is not None:
            defaults["fused"] = fused
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        if not 0 <= group["rho"] <= 1:
            raise ValueError(f"rho: expected in [0, 1], got {group['rho']}")
        check_range("eps", group["eps"], 0)
        check_range("weight_decay", group["weight_decay"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return ADADELTA

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        return group["lr"], group["rho"], group["eps"], group["weight_decay"]
