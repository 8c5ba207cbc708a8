"""AdEMAMix: the reference of its update rule, then the optimizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, decayed, scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack


def slow_beta(t: float, beta1: float, beta3: float, steps: float) -> float:
    """The slow average's decay at step t: from beta1 to beta3 in `steps` steps, linear in its half-life."""
    if t >= steps:
        return beta3
    fast, slow = (1 / math.log(beta) if beta > 0 else 0.0 for beta in (beta1, beta3))
    mixed = (1 - t / steps) * fast + t / steps * slow
    return min(math.exp(1 / mixed) if mixed < 0 else 0.0, beta3)


def ademamix(
    p: Tensor, g: Tensor, m: Tensor, s: Tensor, v: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, beta3: float, alpha: float, eps: float, weight_decay: float,
    T_alpha_beta3: float,
) -> Tensor:  # fmt: skip
    """Update the averages m, s, v in place and return u of p <- p - u, by torch alone."""
    m.lerp_(g, 1 - beta1)
    s.lerp_(g, 1 - slow_beta(t, beta1, beta3, T_alpha_beta3))
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    alpha_now = alpha * t / T_alpha_beta3 if t < T_alpha_beta3 else alpha
    correction1: float = 1 - beta1**t
    correction2: float = 1 - beta2**t
    d = (m / correction1 + alpha_now * s) / ((v / correction2).sqrt() + eps)
    return lr * d + decayed(p, lr * weight_decay)


STATES = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
HYPERS = ("lr", "beta1", "beta2", "beta3", "alpha", "eps", "weight_decay", "T_alpha_beta3")
ADEMAMIX = Rule("ademamix", STATES, HYPERS, True, ademamix, positive=("exp_avg_sq",))


class AdEMAMix(FusedOptimizer):
    r"""AdEMAMix: AdamW with a second, far slower average of the gradients beside the first.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g \quad s \leftarrow \beta_3(t) s + (1-\beta_3(t)) g \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2

    .. math::
        p \leftarrow p - \gamma \Big( \frac{m / (1-\beta_1^t) + \alpha(t) s}{\sqrt{v / (1-\beta_2^t)} + \epsilon}
        + \lambda p \Big)

    Over the first T steps alpha(t) rises linearly to alpha, and beta3(t) from beta1 to beta3 so that the average's
    half-life rises linearly:

    .. math::
        \alpha(t) = \alpha \min(1, t/T) \quad \beta_3(t) = \min\Big(\beta_3, \exp
        \frac{\ln \beta_1 \ln \beta_3}{(1 - t/T) \ln \beta_3 + (t/T) \ln \beta_1} \Big)

    Use it for long trainings, such as language models', in place of AdamW with the same lr and decay; set
    `T_alpha_beta3` to the number of steps of the training, since early steps can diverge without it. Its state is one
    and a half times AdamW's.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay of the first average, of the square's and of the slow average, each in [0, 1).
        alpha: weight of the slow average in the step, >= 0.
        T_alpha_beta3: steps over which alpha and beta3 rise, >= 0; None or 0: they do not change.
        eps: added to the root of the square's average, >= 0.
        weight_decay: decay of the parameter itself, times lr, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Pagliardini, Ablin & Grangier 2024, Alg. 1 (arXiv:2409.03137), whose betas and alpha these are; lr and eps
        as in torch.optim.AdamW, and no decay unless asked for.
    """

    rules = (ADEMAMIX,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor, float | Tensor] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        T_alpha_beta3: int | None = None,
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
            "alpha": alpha,
            "T_alpha_beta3": T_alpha_beta3,
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
        check_range("alpha", group["alpha"], 0)
        check_range("T_alpha_beta3", group["T_alpha_beta3"] or 0, 0)
        check_range("eps", group["eps"], 0)
        check_range("weight_decay", group["weight_decay"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return ADEMAMIX

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        rise = group["T_alpha_beta3"]
        rest = group["alpha"], group["eps"], group["weight_decay"], 0 if rise is None else rise
        return (group["lr"], *group["betas"], *rest)
