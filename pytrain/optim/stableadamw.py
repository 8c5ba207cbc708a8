"""StableAdamW: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, decayed, scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack


def stableadamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update the moments m, v in place and return u of p <- p - u, by torch alone."""
    weight2: float = (1 - beta2) / (1 - beta2**t)
    m.lerp_(g, (1 - beta1) / (1 - beta1**t))
    v.mul_(1 - weight2).addcmul_(g, g, value=weight2)
    rms = (g * g / v.clamp(min=eps * eps)).mean().sqrt()
    rate = lr / rms.clamp(min=1)
    u: Tensor = rate * (m / (v.sqrt() + eps) + decayed(p, weight_decay))
    return u


HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
SQUARES = ("exp_avg_sq",)
STABLEADAMW = Rule("stableadamw", ("exp_avg", *SQUARES), HYPERS, True, stableadamw, sums=1, positive=SQUARES)


class StableAdamW(FusedOptimizer):
    r"""StableAdamW: AdamW that steps less where a parameter's gradients outgrow their second moment.

    .. math::
        \hat\beta = \beta \frac{1 - \beta^{t-1}}{1 - \beta^t} \quad
        m \leftarrow \hat\beta_1 m + (1-\hat\beta_1) g \quad v \leftarrow \hat\beta_2 v + (1-\hat\beta_2) g^2

    .. math::
        R = \sqrt{\operatorname{mean} \frac{g^2}{\max(v, \epsilon^2)}} \quad
        p \leftarrow p - \frac{\gamma}{\max(1, R)} \Big( \frac{m}{\sqrt{v} + \epsilon} + \lambda p \Big)

    The mean is that of one whole parameter. The moments have no bias to correct: the betas grow with t instead, so
    state and AdamW's differ. Use it in place of AdamW where the loss has spikes, with low precision or large models;
    no clipping of the gradients' norm is needed beside it.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decay of the parameter itself, times the lowered lr, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Wortsman et al. 2023, section 3.5 (arXiv:2304.13013); betas and eps as in the authors' code, lr and
        weight_decay as in torch.optim.AdamW.
    """

    rules = (STABLEADAMW,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        eps: float = 1e-6,
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
        return STABLEADAMW

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
