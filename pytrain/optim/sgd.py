"""SGD: the references of its update rules, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range

if TYPE_CHECKING:
    from typing_extensions import Unpack


def sgd(p: Tensor, g: Tensor, *, t: float, lr: float, weight_decay: float) -> Tensor:
    """Return u of p <- p - u, by torch alone."""
    return lr * (g + weight_decay * p if weight_decay else g)


def sgd_momentum(
    p: Tensor, g: Tensor, b: Tensor, *, t: float, lr: float, weight_decay: float, momentum: float, dampening: float
) -> Tensor:
    """Update the momentum buffer b in place and return u of p <- p - u, by torch alone."""
    g = g + weight_decay * p if weight_decay else g
    b.copy_(g if t == 1 else momentum * b + (1 - dampening) * g)
    return lr * b


def sgd_nesterov(
    p: Tensor, g: Tensor, b: Tensor, *, t: float, lr: float, weight_decay: float, momentum: float, dampening: float
) -> Tensor:
    """As `sgd_momentum`, with the gradient one momentum step ahead."""
    decayed = g + weight_decay * p if weight_decay else g
    u = sgd_momentum(p, g, b, t=t, lr=lr, weight_decay=weight_decay, momentum=momentum, dampening=dampening)
    return lr * decayed + momentum * u


HYPERS = ("lr", "weight_decay", "momentum", "dampening")
PLAIN = Rule("sgd", (), HYPERS[:2], False, sgd)
MOMENTUM = Rule("sgd_momentum", ("momentum_buffer",), HYPERS, True, sgd_momentum)
NESTEROV = Rule("sgd_nesterov", ("momentum_buffer",), HYPERS, True, sgd_nesterov)


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent: a drop-in replacement for torch.optim.SGD.

    .. math::
        g \leftarrow g + \lambda p \quad b \leftarrow \mu b + (1-\tau) g \;(\text{first step: } g) \quad
        p \leftarrow p - \gamma b \;(\text{Nesterov: } \gamma (g + \mu b))

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element, as in `Adam`.
        momentum: weight of the past in the buffer, >= 0; 0 keeps no buffer.
        dampening: share of the gradient that does not enter the buffer, from the second step on.
        weight_decay: L2 penalty, added to the gradient, >= 0.
        nesterov: look one momentum step ahead; needs momentum > 0 and dampening == 0.
        maximize: climb instead of descend.
        foreach, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`; sparse gradients take the torch path.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Sutskever et al. 2013 in the form that torch.optim.SGD documents; defaults as there.
    """

    rules = (PLAIN, MOMENTUM, NESTEROV)
    takes_sparse = True
    implementation_keys = ("foreach", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        check_range("momentum", group["momentum"], 0)
        check_range("weight_decay", group["weight_decay"], 0)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov: expected momentum > 0 and dampening == 0, "
                f"got momentum={group['momentum']}, dampening={group['dampening']}"
            )

    def rule(self, group: dict[str, Any]) -> Rule:
        if group["momentum"] == 0:
            return PLAIN
        return NESTEROV if group["nesterov"] else MOMENTUM

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        plain = group["lr"], group["weight_decay"]
        return plain if group["momentum"] == 0 else (*plain, group["momentum"], group["dampening"])
