"""Rprop: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, scalar

if TYPE_CHECKING:
    from typing_extensions import Unpack


def rprop(
    p: Tensor, g: Tensor, prev: Tensor, step_size: Tensor,
    *, t: float, etaminus: float, etaplus: float, step_size_min: float, step_size_max: float,
) -> Tensor:  # fmt: skip
    """Update the gradient and step size of each element in place and return u of p <- p - u, by torch alone."""
    same = g * prev
    factor = torch.ones_like(same).masked_fill(same > 0, etaplus).masked_fill(same < 0, etaminus)
    step_size.mul_(factor).clamp_(step_size_min, step_size_max)
    prev.copy_(g.masked_fill(same < 0, 0.0))
    return torch.where(prev.isnan(), prev, prev.sign()) * step_size  # torch's sign hides nan


HYPERS = ("etaminus", "etaplus", "step_size_min", "step_size_max")
RPROP = Rule("rprop", ("prev", "step_size"), HYPERS, False, rprop, positive=("step_size",), exact=("step_size",))


class Rprop(FusedOptimizer):
    r"""Resilient backpropagation: a drop-in replacement for torch.optim.Rprop.

    .. math::
        s \leftarrow \operatorname{clamp}(f s, s_{min}, s_{max}) \quad f = \begin{cases}
        \eta_+ & g g_{prev} > 0 \\ \eta_- & g g_{prev} < 0 \\ 1 & \text{else} \end{cases} \quad
        g_{prev} \leftarrow \begin{cases} 0 & g g_{prev} < 0 \\ g & \text{else} \end{cases} \quad
        p \leftarrow p - s \operatorname{sign}(g_{prev})

    Each element has its own step size, which grows while its gradient keeps its sign and shrinks when that changes;
    the gradient's size does not matter. Use it with gradients of the full batch (small models, physics, fits):
    the noise of minibatches changes signs and makes the steps collapse.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: what every step size begins at, >= 0; a float or a tensor of one element. Later changes have no effect.
        etas: factors of the step size where the sign changed and where it stayed: 0 < etas[0] < 1 < etas[1].
        step_sizes: the smallest and the largest step size.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`; torch's class has no `fused`.

    Shape: as in `Adam`. Where a gradient is nan the parameter becomes nan; torch leaves it as it is.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Riedmiller & Braun 1993 (IEEE International Conference on Neural Networks), without backtracking as in Igel
        & Huesken 2000 (iRprop-); defaults as in torch.optim.Rprop.
    """

    rules = (RPROP,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "etas": etas,
            "step_sizes": step_sizes,
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
        if not 0 < group["etas"][0] < 1 < group["etas"][1]:
            raise ValueError(f"etas: expected 0 < etas[0] < 1 < etas[1], got {tuple(group['etas'])}")

    def rule(self, group: dict[str, Any]) -> Rule:
        return RPROP

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        return *group["etas"], *group["step_sizes"]

    def initial(self, name: str, param: Tensor, group: dict[str, Any]) -> float | Tensor:
        if name != "step_size":
            return 0.0
        lr = scalar("lr", group["lr"])
        return torch.full_like(param, complex(lr, lr)) if param.is_complex() else lr
