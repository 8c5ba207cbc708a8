"""LARS: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lars(
    p: Tensor, g: Tensor, b: Tensor,
    *, t: float, lr: float, weight_decay: float, momentum: float, trust_coefficient: float,
) -> Tensor:  # fmt: skip
    """Update the momentum buffer b in place and return u of p <- p - u, by torch alone."""
    p_norm, g_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(g)
    local = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm)
    rate = lr * torch.where((p_norm == 0) | (g_norm == 0), 1.0, local)
    b.mul_(momentum).add_(rate * (g + weight_decay * p if weight_decay else g))
    return b.clone()


HYPERS = ("lr", "weight_decay", "momentum", "trust_coefficient")
RULE = Rule("lars", ("momentum_buffer",), HYPERS, False, lars, sums=2)


class LARS(FusedOptimizer):
    r"""LARS: SGD with momentum, and for each parameter a rate from its own norm; made for very large batches.

    .. math::
        \ell = \eta \frac{\|p\|}{\|g\| + \lambda \|p\|} \quad
        b \leftarrow \mu b + \gamma \ell (g + \lambda p) \quad p \leftarrow p - b

    The norms are those of one whole parameter; where either is 0, the local rate l is 1. As in the paper, and unlike
    in torch.optim.SGD, the rates are within the momentum: a change of lr acts on new gradients only. Use it for
    convolutional networks with batches of thousands. Biases and norms' weights, which begin at 0 or stay small, are
    best stepped by SGD.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element. Times the trust coefficient, it is the length of a step
            in parts of the parameter's own.
        momentum: weight of the past in the buffer, in [0, 1).
        weight_decay: L2 penalty, added to the gradient and to its norm, >= 0.
        trust_coefficient: the paper's eta, >= 0: how far a parameter may trust its gradient.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: You, Gitman & Ginsburg 2017, Alg. 1 (arXiv:1708.03888), whose momentum, decay and trust coefficient these
        are; its lr depends on the batch, so that the default of 1 is only where a search can begin.
    """

    rules = (RULE,)
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust_coefficient: float = 1e-3,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        check_range("momentum", group["momentum"], 0, 1)
        check_range("weight_decay", group["weight_decay"], 0)
        check_range("trust_coefficient", group["trust_coefficient"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return RULE

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        return group["lr"], group["weight_decay"], group["momentum"], group["trust_coefficient"]
