"""ASGD: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, decayed, scalar

if TYPE_CHECKING:
    from typing_extensions import Unpack


def asgd(
    p: Tensor, g: Tensor, ax: Tensor, eta: Tensor, mu: Tensor,
    *, t: float, lr: float, lambd: float, alpha: float, t0: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update the average ax, the rate eta and the weight mu in place and return u of p <- p - u, by torch alone."""
    g = g + weight_decay * p if weight_decay else g
    rate, weight = float(eta), float(mu)
    u = rate * g + decayed(p, lambd * rate)
    after = p - u
    ax.copy_(after if weight == 1 else ax + weight * (after - ax))
    eta.fill_(lr / (1 + lambd * lr * t) ** alpha)
    mu.fill_(1 / max(1, t - t0))
    return u


HYPERS = ("lr", "lambd", "alpha", "t0", "weight_decay")
ASGD_RULE = Rule("asgd", ("ax",), HYPERS, True, asgd, scalars=("eta", "mu"), exact=("ax",))


class ASGD(FusedOptimizer):
    r"""Averaged stochastic gradient descent: a drop-in replacement for torch.optim.ASGD.

    .. math::
        g \leftarrow g + \lambda p \quad p \leftarrow p - \eta_t (\ell p + g) \quad
        \bar p \leftarrow \bar p + \mu_t (p - \bar p) \quad
        \eta_{t+1} = \frac{\gamma}{(1 + \ell \gamma t)^\alpha} \quad \mu_{t+1} = \frac{1}{\max(1, t - t_0)}

    SGD whose result is the mean of the parameters after step t0: `optimizer.state[p]["ax"]`, which you copy into
    the model yourself. Use it for convex problems and linear models, where the mean converges as fast as anything
    can, and for language models with a t0 at which the validation loss stops falling.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size of the beginning, >= 0; a float or a tensor of one element.
        lambd: decay of the parameter, and of the step size with the number of steps.
        alpha: power of that decay of the step size.
        t0: the step after which ax becomes a mean; until then it is a copy of the parameter.
        weight_decay: L2 penalty, added to the gradient, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`; torch's class has no `fused`.

    Shape: as in `Adam`; eta and mu are float32 on the CPU.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Polyak & Juditsky 1992 (SIAM J. Control Optim. 30); the step sizes of Xu 2011 (arXiv:1107.2490); form and
        defaults as in torch.optim.ASGD.
    """

    rules = (ASGD_RULE,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
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
        check_range("weight_decay", group["weight_decay"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return ASGD_RULE

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        return group["lr"], group["lambd"], group["alpha"], group["t0"], group["weight_decay"]

    def initial(self, name: str, param: Tensor, group: dict[str, Any]) -> float | Tensor:
        if name == "eta":
            return scalar("lr", group["lr"])
        return 1.0 if name == "mu" else 0.0
