"""NAdam: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, decayed

if TYPE_CHECKING:
    from typing_extensions import Unpack


def nadam(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, mu_product: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decay: float,
    momentum_decay: float,
) -> Tensor:  # fmt: skip
    """Update the moments m, v and the product of the mu in place and return u of p <- p - u, by torch alone."""
    g = g + weight_decay * p if weight_decay else g
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    mu: float = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next: float = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = float(mu_product.mul_(mu))
    correction2: float = 1 - beta2**t
    ahead = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
    return lr * ahead / ((v / correction2).sqrt() + eps) + decayed(p, lr * decay)


HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "decay", "momentum_decay")
NADAM = Rule("nadam", ("exp_avg", "exp_avg_sq"), HYPERS, True, nadam, scalars=("mu_product",), positive=("exp_avg_sq",))


class NAdam(FusedOptimizer):
    r"""NAdam: a drop-in replacement for torch.optim.NAdam.

    .. math::
        g \leftarrow g + \lambda p \quad m \leftarrow \beta_1 m + (1-\beta_1) g \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \quad
        \mu_t = \beta_1 (1 - \tfrac12 0.96^{t \psi}) \quad
        p \leftarrow p - \gamma \frac{\frac{1-\mu_t}{1-\prod_{i \le t} \mu_i} g +
        \frac{\mu_{t+1}}{1-\prod_{i \le t+1} \mu_i} m}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    Adam that looks one momentum step ahead, with a momentum that warms up. Use it as Adam where the early steps
    matter: short runs, recurrent and small models. It costs no more than Adam.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay of the two moments, each in [0, 1); the momentum mu goes from about betas[0] / 2 to betas[0].
        eps: added to the root of the second moment, >= 0.
        weight_decay: L2 penalty, added to the gradient, >= 0.
        momentum_decay: psi, how fast mu grows, >= 0.
        decoupled_weight_decay: decay the parameter itself, by lr * weight_decay, in place of the penalty.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`; torch's class has no `fused`.

    Shape: as in `Adam`; the product of the mu is a float32 on the CPU.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Dozat 2016, Incorporating Nesterov Momentum into Adam (ICLR workshop); form and defaults as in
        torch.optim.NAdam.
    """

    rules = (NADAM,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
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
        check_range("momentum_decay", group["momentum_decay"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return NADAM

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        weight_decay = group["weight_decay"]
        both = (0.0, weight_decay) if group["decoupled_weight_decay"] else (weight_decay, 0.0)
        return group["lr"], beta1, beta2, group["eps"], *both, group["momentum_decay"]

    def initial(self, name: str, param: Tensor, group: dict[str, Any]) -> float | Tensor:
        return 1.0 if name == "mu_product" else 0.0
