"""LAMB: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.adam import HYPERS, SQUARES, adam
from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lamb(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update the moments m, v in place and return u of p <- p - u, by torch alone."""
    d = adam(p, g, m, v, t=t, lr=1.0, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0)
    d = d + weight_decay * p if weight_decay else d
    p_norm, d_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(d)
    return lr * torch.where((p_norm == 0) | (d_norm == 0), 1.0, p_norm / d_norm) * d


RULE = Rule("lamb", ("exp_avg", "exp_avg_sq"), HYPERS, True, lamb, sums=2, positive=SQUARES)


class LAMB(FusedOptimizer):
    r"""LAMB: AdamW whose step has the length of the tensor it changes, times lr; made for very large batches.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \quad
        d = \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda p \quad
        p \leftarrow p - \gamma \frac{\|p\|}{\|d\|} d

    The norms are those of one whole parameter; where either is 0, their ratio is taken as 1. They are not clamped:
    the paper's phi is the identity. Use it for batches of thousands, where AdamW's lr cannot be raised any further;
    it was made for BERT with batches of up to 32k. Biases and norms' weights are best put into a group without decay.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: length of a step in parts of the parameter's own, >= 0; a float or a tensor of one element.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decay of the parameter itself, within the direction that the norm is taken of, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: You et al. 2020, Alg. 2 (arXiv:1904.00962), with Adam's bias corrections; betas, eps and weight_decay as in
        the paper's BERT training, lr as Adam's.
    """

    rules = (RULE,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
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
        return RULE

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
