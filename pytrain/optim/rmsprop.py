"""RMSprop: the references of its update rules, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range

if TYPE_CHECKING:
    from typing_extensions import Unpack


def rmsprop(
    p: Tensor, g: Tensor, v: Tensor, b: Tensor | None = None, c: Tensor | None = None,
    *, t: float, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float,
) -> Tensor:  # fmt: skip
    """Update the means v of g^2 and c of g and the buffer b in place and return u of p <- p - u, by torch alone."""
    g = g + weight_decay * p if weight_decay else g
    v.mul_(alpha).addcmul_(g, g, value=1 - alpha)
    variance = v if c is None else v - c.lerp_(g, 1 - alpha) ** 2
    direction = g / (variance.clamp(min=0).sqrt() + eps)
    return lr * (direction if b is None else b.mul_(momentum).add_(direction))


def rmsprop_centered(p: Tensor, g: Tensor, v: Tensor, c: Tensor, **hypers: float) -> Tensor:
    """As `rmsprop`, with the mean c of g and without a buffer."""
    return rmsprop(p, g, v, None, c, **hypers)


HYPERS = ("lr", "alpha", "eps", "weight_decay", "momentum")
SQUARES = ("square_avg",)
PLAIN = Rule("rmsprop", SQUARES, HYPERS, False, rmsprop, positive=SQUARES)
MOMENTUM = Rule("rmsprop_momentum", (*SQUARES, "momentum_buffer"), HYPERS, False, rmsprop, positive=SQUARES)
CENTERED = Rule("rmsprop_centered", (*SQUARES, "grad_avg"), HYPERS, False, rmsprop_centered, positive=SQUARES)
CENTERED_MOMENTUM = Rule(
    "rmsprop_centered_momentum", (*MOMENTUM.states, "grad_avg"), HYPERS, False, rmsprop, positive=SQUARES
)


class RMSprop(FusedOptimizer):
    r"""RMSprop: a drop-in replacement for torch.optim.RMSprop.

    .. math::
        g \leftarrow g + \lambda p \quad v \leftarrow \alpha v + (1-\alpha) g^2 \quad
        d = \frac{g}{\sqrt{v} + \epsilon} \quad
        p \leftarrow p - \gamma d \;(\text{momentum: } b \leftarrow \mu b + d, \; p \leftarrow p - \gamma b)

    Centered, the mean :math:`c \leftarrow \alpha c + (1-\alpha) g` is taken out: :math:`\sqrt{v - c^2}` in place of
    :math:`\sqrt{v}`.

    Gradients divided by their recent size, without Adam's correction of the first steps. Use it for reinforcement
    learning and recurrent networks, to reproduce older vision models (with momentum), and where Adam's momentum
    hurts; one state in place of Adam's two.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        alpha: decay of the means, >= 0; below 1 in any sensible use.
        eps: added to the root, >= 0.
        weight_decay: L2 penalty, added to the gradient, >= 0.
        momentum: weight of the past in the buffer, >= 0; 0 keeps no buffer.
        centered: divide by the standard deviation, not the root mean square. As in torch the result is nan where
            rounding makes the variance negative, which gradients that hardly change can do.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`; torch's class has no `fused`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Tieleman & Hinton 2012, lecture 6.5 of Neural Networks for Machine Learning; centered: Graves 2013
        (arXiv:1308.0850); form and defaults as in torch.optim.RMSprop.
    """

    rules = (PLAIN, MOMENTUM, CENTERED, CENTERED_MOMENTUM)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        if fused is not None:
            defaults["fused"] = fused
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        check_range("eps", group["eps"], 0)
        check_range("momentum", group["momentum"], 0)
        check_range("weight_decay", group["weight_decay"], 0)
        check_range("alpha", group["alpha"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        if group["momentum"] > 0:
            return CENTERED_MOMENTUM if group["centered"] else MOMENTUM
        return CENTERED if group["centered"] else PLAIN

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        return group["lr"], group["alpha"], group["eps"], group["weight_decay"], group["momentum"]
