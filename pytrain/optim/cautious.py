"""Cautious AdamW and Lion: the references of their update rules, then the optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.adam import HYPERS, adam
from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, decayed, scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack


def cautious(d: Tensor, m: Tensor, g: Tensor) -> Tensor:
    """The direction d where m, which it has the sign of, has the gradient's; else 0; scaled up for what is left out."""
    agree = (torch.sign(m) * torch.sign(g) > 0).to(d.dtype)  # by their signs, as m * g can vanish
    return d * (agree / agree.mean().clamp(min=1e-3))


def cautious_adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update the moments m, v in place and return u of p <- p - u, by torch alone."""
    u = adam(p, g, m, v, t=t, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0)
    return cautious(u, m, g) + decayed(p, lr * weight_decay)


def cautious_lion(
    p: Tensor, g: Tensor, m: Tensor, *, t: float, lr: float, beta1: float, beta2: float, weight_decay: float
) -> Tensor:
    """Update the momentum m in place and return u of p <- p - u, by torch alone."""
    mixed = beta1 * m + (1 - beta1) * g
    m.lerp_(g, 1 - beta2)
    d = torch.where(mixed.isnan(), mixed, torch.sign(mixed))  # torch's sign of nan is 0, which would hide it
    return lr * cautious(d, mixed, g) + decayed(p, lr * weight_decay)


ADAMW = Rule(
    "cautious_adamw", ("exp_avg", "exp_avg_sq"), HYPERS, True, cautious_adamw, sums=1, positive=("exp_avg_sq",)
)
LION = Rule("cautious_lion", ("exp_avg",), ("lr", "beta1", "beta2", "weight_decay"), False, cautious_lion, sums=1)


class CautiousAdamW(FusedOptimizer):
    r"""Cautious AdamW: AdamW that leaves out what goes against the present gradient.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \quad
        d = \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    .. math::
        k = 1 \text{ where } d g > 0, \text{ else } 0 \quad
        p \leftarrow p - \gamma \Big( d \frac{k}{\max(\operatorname{mean} k, 10^{-3})} + \lambda p \Big)

    The mean is that of one whole parameter; the decay is not masked. Use it in place of AdamW, with its arguments and
    its state: a checkpoint of either can be loaded into the other.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decay of the parameter itself, times lr, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Liang et al. 2024, Alg. 1 and section 3 (arXiv:2411.16085); defaults as in torch.optim.AdamW.
    """

    rules = (ADAMW,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
            "betas": scalars("betas", betas, 2),
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
        check_range("eps", group["eps"], 0)
        check_range("weight_decay", group["weight_decay"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return ADAMW

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], beta1, beta2, group["eps"], group["weight_decay"]


class CautiousLion(FusedOptimizer):
    r"""Cautious Lion: Lion that leaves out what goes against the present gradient.

    .. math::
        d = \operatorname{sign}(\beta_1 m + (1-\beta_1) g) \quad m \leftarrow \beta_2 m + (1-\beta_2) g \quad
        k = 1 \text{ where } d g > 0, \text{ else } 0

    .. math::
        p \leftarrow p - \gamma \Big( d \frac{k}{\max(\operatorname{mean} k, 10^{-3})} + \lambda p \Big)

    The mean is that of one whole parameter; the decay is not masked. Use it in place of Lion, with its arguments and
    its state.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: weight of the momentum in the step, and its decay; each in [0, 1).
        weight_decay: decay of the parameter itself, times lr, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Liang et al. 2024 (arXiv:2411.16085); defaults as in `Lion`.
    """

    rules = (LION,)
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
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
            "betas": scalars("betas", betas, 2),
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
        check_range("weight_decay", group["weight_decay"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return LION

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], beta1, beta2, group["weight_decay"]
