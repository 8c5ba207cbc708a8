"""AdamW: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.adam import HYPERS, SQUARES, Adam, adam
from pytrain.optim.base import Options, Rule, decayed

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, vmax: Tensor | None = None,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Adam's update without decay in the gradient, plus lr * weight_decay * p."""
    u = adam(p, g, m, v, vmax, t=t, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0)
    return u + decayed(p, lr * weight_decay)


ADAMW = Rule("adamw", ("exp_avg", "exp_avg_sq"), HYPERS, True, adamw, positive=SQUARES)
AMSGRAD = Rule("adamw_amsgrad", (*ADAMW.states, "max_exp_avg_sq"), HYPERS, True, adamw, positive=SQUARES)


class AdamW(Adam):
    r"""AdamW: a drop-in replacement for torch.optim.AdamW.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \quad
        p \leftarrow p - \gamma \Big( \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda p \Big)

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element, as in `Adam`.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decay of the parameter itself, times lr, >= 0.
        amsgrad: divide by the largest second moment so far (arXiv:1904.09237).
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Loshchilov & Hutter 2019, Alg. 2 (arXiv:1711.05101); defaults as in torch.optim.AdamW.
    """

    rules = (ADAMW, AMSGRAD)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )
