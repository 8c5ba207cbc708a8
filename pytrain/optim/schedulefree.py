"""Schedule-Free AdamW: the reference of its update rule, then the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain.optim.base import FusedOptimizer, Options, Rule, check_range, scalars
from pytrain.optim.storage import LOW_PRECISION, decode_param, encode_param

if TYPE_CHECKING:
    from typing_extensions import Unpack


def schedulefree_adamw(
    y: Tensor, g: Tensor, z: Tensor, v: Tensor, weight_sum: Tensor, lr_max: Tensor,
    *, t: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, warmup_steps: float,
    r: float, weight_lr_power: float,
) -> Tensor:  # fmt: skip
    """Update z, the second moment v and the scalars in place and return u of y <- y - u, by torch alone."""
    rate = lr * (t / warmup_steps) if t < warmup_steps else lr
    largest = max(float(lr_max), rate)
    weight: float = t**r * largest**weight_lr_power if largest > 0 else 0.0
    total = float(weight_sum) + weight
    share = weight / total if total > 0 else 0.0
    lr_max.fill_(largest)
    weight_sum.fill_(total)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction2: float = 1 - beta2**t
    d = g / ((v / correction2).sqrt() + eps)
    d = d + weight_decay * y if weight_decay else d
    u = share * (y - z) + rate * (1 - beta1 * (1 - share)) * d
    z.sub_(rate * d)
    return u


HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power")
SCALARS = ("weight_sum", "lr_max")
SCHEDULEFREE = Rule(
    "schedulefree_adamw", ("z", "exp_avg_sq"), HYPERS, True, schedulefree_adamw,
    scalars=SCALARS, positive=("exp_avg_sq",), exact=("z",),
)  # fmt: skip


class ScheduleFreeAdamW(FusedOptimizer):
    r"""Schedule-Free AdamW: AdamW at a constant rate with an average of its weights instead of a schedule.

    .. math::
        y = (1-\beta_1) z + \beta_1 x \quad v \leftarrow \beta_2 v + (1-\beta_2) g(y)^2 \quad
        d = \frac{g(y)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda y

    .. math::
        z \leftarrow z - \gamma_t d \quad x \leftarrow (1-c) x + c z \quad
        c = \frac{w_t}{\sum_{i \le t} w_i} \quad w_t = t^r \big(\max_{i \le t} \gamma_i\big)^k \quad
        \gamma_t = \gamma \min(1, t/T)

    T is `warmup_steps` and k `weight_lr_power`. Use it where the number of steps is not known beforehand: x is as good
    at every step as a schedule that ends there; use no lr scheduler with it. Its state is AdamW's, in size.

    While training the parameters hold y, where the gradients are to be taken; the weights to evaluate and to publish
    are x, which is not stored but found from y and z. `eval()` puts x into the parameters, `train()` puts y back; a
    new optimizer is in train mode. Call `eval()` before validation and before saving a model for use, and `train()`
    before the next step. Save and load model and optimizer in the same mode: the mode is in the checkpoint, as
    `train_mode` of the param groups. Running averages of BatchNorm are those of y: let some batches pass in x.

    Each switch rounds to the parameter's dtype, and finding x multiplies what y lacks in precision by 1/beta1. In
    fp32 that is not to be seen. A bf16 or fp16 parameter alone moves by about its last bit with every two switches,
    and its x is no more exact than y and z are: train those with `master_weights=True`, which is switched as well,
    and keeps z in fp32.

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: step size after warm-up, held constant; 1 to 10 times AdamW's, >= 0; a float or a tensor of one element.
        betas: weight of x in y, in (0, 1); decay of the second moment, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decay, taken at y, times lr, >= 0.
        warmup_steps: steps over which lr rises linearly, >= 0.
        r: power of t in the average's weights, >= 0.
        weight_lr_power: power of the largest lr so far in the average's weights, >= 0.
        maximize: climb instead of descend.
        foreach, capturable, differentiable, fused, options: as in `Adam`.

    Shape: as in `Adam`.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: `differentiable`, or `fused` together with `foreach`;
            `step` in eval mode, `check_eval` in train mode.

    Source: Defazio et al. 2024, Alg. 1 (arXiv:2405.15682), which is r = 0 and weight_lr_power = 2; defaults as in the
        authors' code.
    """

    rules = (SCHEDULEFREE,)
    steps_in_state = True
    implementation_keys = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
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
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "train_mode": True,
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
        if group["betas"][0] == 0:
            raise ValueError("betas[0]: expected in (0, 1), got 0.0: x could not be found from y and z")
        check_range("betas[1]", group["betas"][1], 0, 1)
        check_range("eps", group["eps"], 0)
        check_range("weight_decay", group["weight_decay"], 0)
        check_range("warmup_steps", group["warmup_steps"], 0)
        check_range("r", group["r"], 0)
        check_range("weight_lr_power", group["weight_lr_power"], 0)

    def rule(self, group: dict[str, Any]) -> Rule:
        return SCHEDULEFREE

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        adam = group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
        return (*adam, group["warmup_steps"], group["r"], group["weight_lr_power"])

    def initial(self, name: str, param: Tensor, group: dict[str, Any]) -> float | Tensor:
        return param if name == "z" else 0.0

    @property
    def train_mode(self) -> bool:
        """Whether the parameters hold y, to be trained, and not x, to be evaluated."""
        return all(group["train_mode"] for group in self.param_groups)

    def train(self) -> None:
        """Put y into the parameters, to take gradients and steps there; nothing if they hold it."""
        self._switch(True)

    def eval(self) -> None:
        """Put x, the average, into the parameters, to evaluate or save it; nothing if they hold it."""
        self._switch(False)

    def check_eval(self) -> None:
        """Raise RuntimeError if a parameter holds y: for whoever is about to evaluate."""
        if any(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("the parameters are not the weights to evaluate: call optimizer.eval() first")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, as `FusedOptimizer.step`.

        Raises:
            RuntimeError: in eval mode; nothing was written then.
        """
        if not self.train_mode:
            raise RuntimeError("the parameters are not where gradients are to be taken: call optimizer.train() first")
        return super().step(closure)

    @torch.no_grad()
    def _switch(self, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                continue
            beta1 = float(group["betas"][0])
            weight = 1 - beta1 if train_mode else 1 - 1 / beta1  # y = x + (1-b1) (z - x), and back
            for param in {id(p): p for p in group["params"]}.values():  # one that is listed twice is switched once
                state = self.state.get(param, {})
                z = state.get("z")
                if z is None:
                    continue
                if param.dtype not in LOW_PRECISION:
                    param.copy_(param.lerp(z.to(param.dtype), weight))
                    continue
                keep = self.storage.kept(param)
                kept = state.get(keep)
                wide = decode_param(param, kept, keep).lerp(z.float(), weight)
                encode_param(param, kept, keep, wide)
            group["train_mode"] = train_mode
