"""RAdam: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, decayed

if TYPE_CHECKING:
    from typing_extensions import Unpack


def radam(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decay: float,
) -> Tensor:  # fmt: skip
    """Update the moments m, v in place and return u of p <- p - u, by torch alone."""
    g = g + weight_decay * p if weight_decay else g
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction1: float = 1 - beta1**t
    correction2: float = 1 - beta2**t
    rho = 2 / (1 - beta2) - 1
    rho_t: float = rho - 2 * t * beta2**t / correction2
    u = lr / correction1 * m
    if rho_t > 5:
        square: float = (rho_t - 4) * (rho_t - 2) * rho / ((rho - 4) * (rho - 2) * rho_t)
        u = (square * correction2) ** 0.5 * u / (v.sqrt() + eps)
    return u + decayed(p, lr * decay)


HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "decay")
RADAM = Rule("radam", ("exp_avg", "exp_avg_sq"), HYPERS, True, radam, positive=("exp_avg_sq",))


class RAdam(FusedOptimizer):
    r"""RAdam: a drop-in replacement for torch.optim.RAdam.

    .. math::
        g \leftarrow g + \lambda p \quad m \leftarrow \beta_1 m + (1-\beta_1) g \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \quad
        \rho_\infty = \tfrac{2}{1-\beta_2} - 1 \quad \rho_t = \rho_\infty - \tfrac{2 t \beta_2^t}{1-\beta_2^t}

    .. math::
        p \leftarrow p - \gamma \frac{m}{1-\beta_1^t} \cdot \begin{cases}
        \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}
        \frac{\sqrt{1-\beta_2^t}}{\sqrt{v} + \epsilon} & \rho_t > 5 \\ 1 & \text{else} \end{cases}

    Adam with a warmup built in: its first steps are plain momentum, and the adaptive ones grow as the second moment
    gets reliable. Use it where Adam needs a warmup and you do not want to tune one. The first five steps (betas[1] of
    0.99 or more) do not divide by the root, so very large gradients move parameters far there: clip them.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: L2 penalty, added to the gradient, >= 0.
        decoupled_weight_decay: decay the parameter itself, by lr * weight_decay, in place of the penalty.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`; torch's class has no `fused`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Liu et al. 2020, Alg. 2 (arXiv:1908.03265); form (5 where the paper has 4) and defaults as in
        torch.optim.RAdam.
    """

    rules = (RADAM,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
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
        return RADAM

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        weight_decay = group["weight_decay"]
        both = (0.0, weight_decay) if group["decoupled_weight_decay"] else (weight_decay, 0.0)
        return group["lr"], beta1, beta2, group["eps"], *both
