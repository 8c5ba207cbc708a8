"""Adamax: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adamax(
    p: Tensor, g: Tensor, m: Tensor, norm: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update the momentum m and the norm of the gradients in place and return u of p <- p - u, by torch alone."""
    g = g + weight_decay * p if weight_decay else g
    m.lerp_(g, 1 - beta1)
    norm.copy_(torch.maximum(beta2 * norm, g.abs() + eps))
    correction: float = 1 - beta1**t
    return lr / correction * m / norm


HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
ADAMAX = Rule("adamax", ("exp_avg", "exp_inf"), HYPERS, True, adamax, positive=("exp_inf",))


class Adamax(FusedOptimizer):
    r"""Adamax: a drop-in replacement for torch.optim.Adamax.

    .. math::
        g \leftarrow g + \lambda p \quad m \leftarrow \beta_1 m + (1-\beta_1) g \quad
        n \leftarrow \max(\beta_2 n, |g| + \epsilon) \quad
        p \leftarrow p - \frac{\gamma}{1-\beta_1^t} \frac{m}{n}

    Adam with the largest recent gradient in place of the root mean square: no element moves by much more than lr,
    even after an outlier. Use it where gradients are sparse or heavy-tailed, as with embeddings; else Adam.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay of the momentum and of the norm, each in [0, 1).
        eps: added to the gradient's size, >= 0.
        weight_decay: L2 penalty, added to the gradient, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`; torch's class has no `fused`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Kingma & Ba 2015, Alg. 2 (arXiv:1412.6980); form and defaults as in torch.optim.Adamax.
    """

    rules = (ADAMAX,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        if fused is not None:
            defaults["fused"] = fused
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        check_range("betas[0]", group["betas"][0], 0, 1)
        check_range("betas[1]", group["betas"][1], 0, 1)
        check_range("eps", group["eps"], 0)
        check_range("weight_decay", group["weight_decay"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return ADAMAX

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
