"""Lion: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, decayed, scalars, sign

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lion(
    p: Tensor, g: Tensor, m: Tensor, *, t: float, lr: float, beta1: float, beta2: float, weight_decay: float
) -> Tensor:
    """Update the momentum m in place and return u of p <- p - u, by torch alone."""
    u = lr * sign(beta1 * m + (1 - beta1) * g) + decayed(p, lr * weight_decay)
    m.lerp_(g, 1 - beta2)
    return u


LION = Rule("lion", ("exp_avg",), ("lr", "beta1", "beta2", "weight_decay"), False, lion)


class Lion(FusedOptimizer):
    r"""Lion: only the sign of a momentum steps, so every element moves by the same amount.

    .. math::
        p \leftarrow p - \gamma ( \operatorname{sign}(\beta_1 m + (1-\beta_1) g) + \lambda p ) \quad
        m \leftarrow \beta_2 m + (1-\beta_2) g

    Its state is half of AdamW's. The paper advises a 3 to 10 times smaller lr and a larger weight_decay than
    AdamW's, and large batches.

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

    Source: Chen et al. 2023, Alg. 2 (arXiv:2302.06675), whose defaults these are.
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
