"""Adan: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, decayed, scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adan(
    p: Tensor, g: Tensor, m: Tensor, w: Tensor, n: Tensor, g_before: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, beta3: float, eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update the moments m, w, n and the last gradient in place and return u of p <- p - u, by torch alone."""
    d = g - g_before if t > 1 else torch.zeros_like(g)
    ahead = g + beta2 * d
    g_before.copy_(g)
    m.lerp_(g, 1 - beta1)
    w.lerp_(d, 1 - beta2)
    n.mul_(beta3).addcmul_(ahead, ahead, value=1 - beta3)
    correction1: float = 1 - beta1**t
    correction2: float = 1 - beta2**t
    correction3: float = 1 - beta3**t
    s = lr * (m / correction1 + beta2 * (w / correction2)) / ((n / correction3).sqrt() + eps)
    growth = 1 + lr * weight_decay
    return s / growth + decayed(p, lr * weight_decay / growth)


STATES = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "pre_grad")
HYPERS = ("lr", "beta1", "beta2", "beta3", "eps", "weight_decay")
ADAN = Rule("adan", STATES, HYPERS, True, adan, positive=("exp_avg_sq",), exact=("pre_grad",))


class Adan(FusedOptimizer):
    r"""Adan: Adam with Nesterov momentum, by a moment of the differences of successive gradients.

    .. math::
        d = g_t - g_{t-1} \;(\text{first step: } 0) \quad m \leftarrow \beta_1 m + (1-\beta_1) g \quad
        w \leftarrow \beta_2 w + (1-\beta_2) d

    .. math::
        n \leftarrow \beta_3 n + (1-\beta_3) (g + \beta_2 d)^2 \quad
        s = \gamma \frac{m / (1-\beta_1^t) + \beta_2 w / (1-\beta_2^t)}{\sqrt{n / (1-\beta_3^t)} + \epsilon} \quad
        p \leftarrow \frac{p - s}{1 + \gamma \lambda}

    The betas are decays, as in Adam: 1 minus the paper's. The decay is the paper's proximal one; its code's
    `no_prox`, which decays as AdamW does, is left out. Its state is twice AdamW's; it stands rates 5 to 10 times
    AdamW's. Use it for vision models and transformers where memory is not what limits.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay of the gradient's moment, of the differences' and of the square's, each in [0, 1).
        eps: added to the root of the square's moment, >= 0.
        weight_decay: proximal decay of the parameter itself, times lr, >= 0; the paper takes 0.02.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Xie et al. 2022, Alg. 1 (arXiv:2208.06677), with the bias corrections and the defaults of the authors' code.
    """

    rules = (ADAN,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor, float | Tensor] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
            "betas": scalars("betas", betas, 3),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        check_range("betas[0]", group["betas"][0], 0, 1)
        check_range("betas[1]", group["betas"][1], 0, 1)
        check_range("betas[2]", group["betas"][2], 0, 1)
        check_range("eps", group["eps"], 0)
        check_range("weight_decay", group["weight_decay"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return ADAN

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2, beta3 = group["betas"]
        return group["lr"], beta1, beta2, beta3, group["eps"], group["weight_decay"]
