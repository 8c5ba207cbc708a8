"""NovoGrad: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack


def novograd(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update the moment m and the scalar v in place and return u of p <- p - u, by torch alone."""
    square = g.square().sum()
    v_now = square if t == 1 else beta2 * v.to(square) + (1 - beta2) * square
    v.copy_(v_now)
    d = g / (v_now.sqrt() + eps)
    m.mul_(beta1).add_(d + weight_decay * p if weight_decay else d)
    return lr * m


HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
SCALARS = ("exp_avg_sq",)
NOVOGRAD = Rule("novograd", ("exp_avg",), HYPERS, True, novograd, scalars=SCALARS, sums=1)


class NovoGrad(FusedOptimizer):
    r"""NovoGrad: momentum of gradients, each divided by the average norm of its whole parameter's gradient.

    .. math::
        v \leftarrow \beta_2 v + (1-\beta_2) \|g\|^2 \;(\text{first step: } \|g\|^2) \quad
        m \leftarrow \beta_1 m + \frac{g}{\sqrt{v} + \epsilon} + \lambda p \quad
        p \leftarrow p - \gamma m

    This is the form of the paper's Alg. 1, whose m is a sum; in the form with an average, the new term is multiplied
    by 1 - beta1: divide lr by 1 - beta1 to come from there. v is one fp32 number a parameter, so its state is half of
    AdamW's. Use it where SGD with momentum works but wants its lr tuned: it was made for speech and image networks.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay of the momentum and of the squared norm, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decay of the parameter, added to the normalised gradient, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Ginsburg et al. 2019, Alg. 1 (arXiv:1905.11286), whose betas and eps these are; lr is a common choice.
    """

    rules = (NOVOGRAD,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.95, 0.98),
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
        return NOVOGRAD

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
