"""Adagrad: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range
from pytrain.optim.states import Entry, formats_of, make

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adagrad(
    p: Tensor, g: Tensor, total: Tensor, *, t: float, lr: float, lr_decay: float, eps: float, weight_decay: float
) -> Tensor:
    """Add the squared gradient to the total in place and return u of p <- p - u, by torch alone."""
    g = g + weight_decay * p if weight_decay else g
    total.addcmul_(g, g)
    return lr / (1 + (t - 1) * lr_decay) * g / (total.sqrt() + eps)


ADAGRAD = Rule("adagrad", ("sum",), ("lr", "lr_decay", "eps", "weight_decay"), True, adagrad, positive=("sum",))


class Adagrad(FusedOptimizer):
    r"""Adagrad: a drop-in replacement for torch.optim.Adagrad.

    .. math::
        g \leftarrow g + \lambda p \quad s \leftarrow s + g^2 \quad
        p \leftarrow p - \frac{\gamma}{1 + (t-1) \eta} \frac{g}{\sqrt{s} + \epsilon}

    It never forgets a gradient, so the step of each element only shrinks: the more often an element had gradients,
    the smaller. Use it for features or embeddings of very uneven frequency (recommenders, linear models, words) and
    for convex problems; in long training of deep networks it stalls where Adam does not.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size, >= 0; a float or a tensor of one element.
        lr_decay: eta, how fast lr falls with the number of steps, >= 0.
        weight_decay: L2 penalty, added to the gradient, >= 0.
        initial_accumulator_value: what the sum s begins at, >= 0; as in torch, the same for all param groups.
        eps: added to the root of the sum, >= 0.
        maximize: climb instead of descend.
        foreach, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`; sparse gradients take the torch path. State is made with the optimizer, as in torch.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`.

    Source: Duchi, Hazan & Singer 2011, Fig. 1 (JMLR 12); form and defaults as in torch.optim.Adagrad.
    """

    rules = (ADAGRAD,)
    steps_in_state = True
    takes_sparse = True
    implementation_keys = ("foreach", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, and make the state of its parameters, which other optimizers make when they step.

        Raises:
            ValueError: a hyperparameter of the group is out of its range.
        """
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        for number, param in enumerate(group["params"]):
            where = f"Adagrad: param_groups[{index}]['params'][{number}]"
            entry = Entry(param, index, group, number, where, ADAGRAD, formats_of(self, ADAGRAD, param))
            for key in ("step", "sum"):
                make(self, entry, key)

    def share_memory(self) -> None:
        """Move the sums (not the step counts, as in torch) into shared memory, for training by several processes."""
        for state in self.state.values():
            for key, value in state.items():
                if key != "step":
                    value.share_memory_()

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        check_range("lr_decay", group["lr_decay"], 0)
        check_range("weight_decay", group["weight_decay"], 0)
        check_range("initial_accumulator_value", group["initial_accumulator_value"], 0)
        check_range("eps", group["eps"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return ADAGRAD

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        return group["lr"], group["lr_decay"], group["eps"], group["weight_decay"]

    def initial(self, name: str, param: Tensor, group: dict[str, Any]) -> float | Tensor:
        value: float = self.defaults["initial_accumulator_value"]
        return torch.full_like(param, complex(value, value)) if param.is_complex() else value
