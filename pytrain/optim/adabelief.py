"""AdaBelief: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, decayed, scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adabelief(
    p: Tensor, g: Tensor, m: Tensor, s: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update the mean m and the variance s in place and return u of p <- p - u, by torch alone."""
    m.lerp_(g, 1 - beta1)
    s.mul_(beta2).addcmul_(g - m, g - m, value=1 - beta2).add_(eps)
    correction1: float = 1 - beta1**t
    correction2: float = 1 - beta2**t
    u: Tensor = lr / correction1 * m / ((s / correction2).sqrt() + eps) + decayed(p, lr * weight_decay)
    return u


HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
VARIANCE = ("exp_avg_var",)
ADABELIEF = Rule("adabelief", ("exp_avg", *VARIANCE), HYPERS, True, adabelief, positive=VARIANCE)


class AdaBelief(FusedOptimizer):
    r"""AdaBelief: AdamW that divides by how far gradients are from their mean, not by how large they are.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g \quad
        s \leftarrow \beta_2 s + (1-\beta_2) (g - m)^2 + \epsilon \quad
        p \leftarrow (1 - \gamma \lambda) p -
        \gamma \frac{m}{1-\beta_1^t} \Big/ \Big(\sqrt{\frac{s}{1-\beta_2^t}} + \epsilon\Big)

    Steps are long where gradients agree with their mean and short where they do not. Use it where SGD generalizes
    better than Adam but learns too slowly, for instance with convolutional or adversarial networks. eps decides how
    long a step can get where gradients hardly change: the authors take 1e-16 with transformers, 1e-8 with images.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay of the mean and of the variance, each in [0, 1).
        eps: added to the variance in each step, and to its root, >= 0.
        weight_decay: decay of the parameter itself, times lr, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Zhuang et al. 2020, Alg. 2 (arXiv:2010.07468), with AdamW's decay and without a rectified warmup; lr,
        betas and eps as in the authors' code (adabelief-pytorch 0.2), weight_decay as in torch.optim.AdamW.
    """

    rules = (ADABELIEF,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-16,
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
        return ADABELIEF

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
