"""Adam: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adam(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, vmax: Tensor | None = None,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update the moments m, v (and AMSGrad's vmax) in place and return u of p <- p - u, by torch alone."""
    g = g + weight_decay * p if weight_decay else g
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = v if vmax is None else vmax.copy_(torch.maximum(vmax, v))
    correction1: float = 1 - beta1**t
    correction2: float = 1 - beta2**t
    return lr / correction1 * m / ((root / correction2).sqrt() + eps)


HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
ADAM = Rule("adam", ("exp_avg", "exp_avg_sq"), HYPERS, True, adam, positive=SQUARES)
AMSGRAD = Rule("adam_amsgrad", (*ADAM.states, "max_exp_avg_sq"), HYPERS, True, adam, positive=SQUARES)


class Adam(FusedOptimizer):
    r"""Adam: a drop-in replacement for torch.optim.Adam.

    .. math::
        g \leftarrow g + \lambda p \quad m \leftarrow \beta_1 m + (1-\beta_1) g \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \quad
        p \leftarrow p - \gamma \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element. A tensor is taken as it is in each step, on a GPU
            without a wait, also where a graph is replayed; its range is checked when the optimizer is made, and not
            again.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: L2 penalty, added to the gradient, >= 0.
        amsgrad: divide by the largest second moment so far (arXiv:1904.09237).
        foreach: accepted; the kernels always take all tensors in one loop.
        maximize: climb instead of descend.
        capturable: accepted; the step count is on the CPU, or beside a parameter that the CUDA kernels step.
        differentiable: not supported: use torch.optim.Adam.
        fused: True demands the kernels, False the torch path, None takes the kernels where they can serve.
        decoupled_weight_decay: decay the parameter itself, as AdamW does.
        options: storage and loss scaling, the same for every optimizer: see `Options`.

    Shape: parameters of any shape and strides whose elements do not share memory; float32, float64, bfloat16 or
        float16 in the kernels, any floating or complex dtype in the torch path. State has the parameter's dtype.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Kingma & Ba 2015, Alg. 1 (arXiv:1412.6980); defaults as in torch.optim.Adam.
    """

    rules = (ADAM, AMSGRAD)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": scalars("betas", betas, 2),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        check_range("betas[0]", group["betas"][0], 0, 1)
        check_range("betas[1]", group["betas"][1], 0, 1)
        check_range("eps", group["eps"], 0)
        check_range("weight_decay", group["weight_decay"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        if group.get("decoupled_weight_decay"):
            from pytrain.optim import adamw  # AdamW is an Adam, so this file cannot need it at import

            return adamw.AMSGRAD if group["amsgrad"] else adamw.ADAMW
        return AMSGRAD if group["amsgrad"] else ADAM

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
