"""Adafactor: the reference of one step of one parameter, then the optimizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain import backend
from pytrain.control import CONTROL_HEAD, CONTROL_HYPERS, CONTROL_ROW, INV_SCALE
from pytrain.optim.base import FusedOptimizer, Options, check_range, decayed, scalar
from pytrain.optim.slow import check_disjoint
from pytrain.optim.states import UnfitError, lay_out_number
from pytrain.optim.storage import LOW_PRECISION

if TYPE_CHECKING:
    from typing_extensions import Unpack

SUPPORTED = {"amp_scaling", "seed"}  # of `Options`; a seed has nothing to do without stochastic rounding


def adafactor(
    p: Tensor, g: Tensor, *variances: Tensor,
    t: float, lr: float, beta2_decay: float, eps1: float, eps2: float, d: float, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Update row_var and col_var, or variance, in place and return u of p <- p - u, by torch alone."""
    weight = t**beta2_decay
    if len(variances) == 2:
        row_var, col_var = variances
        row_var.lerp_(g.square().mean(-1, keepdim=True), weight)
        col_var.lerp_(g.square().mean(-2, keepdim=True), weight)
        root = (row_var / row_var.mean(-2, keepdim=True).clamp(min=eps1)).sqrt() * col_var.sqrt()
    else:
        (variance,) = variances
        root = variance.lerp_(g.square(), weight).sqrt()
    u: Tensor = g / root.clamp(min=eps1)
    alpha = min(lr, 1 / math.sqrt(t)) * max(eps2, rms(p))
    return decayed(p, lr * weight_decay) + alpha / max(1.0, rms(u) / d) * u


def rms(x: Tensor) -> float:
    """The root of the mean square."""
    return float(x.norm()) / math.sqrt(x.numel())


def state_shapes(param: Tensor) -> dict[str, list[int]]:
    """The states that a parameter has, and their shapes: those of a matrix factored over the last two dimensions."""
    shape = list(param.shape)
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": [*shape[:-1], 1], "col_var": [*shape[:-2], 1, shape[-1]]}


class Adafactor(FusedOptimizer):
    r"""Adafactor: a drop-in replacement for torch.optim.Adafactor.

    The second moment of a matrix is kept as the means of its rows and of its columns, and there is no first moment: the
    state of an (n, m) matrix is n + m numbers, where Adam's is 2 n m. To train or fine-tune what would not fit into
    memory with Adam's state.

    .. math::
        \beta = 1 - t^{\tau} \quad R \leftarrow \beta R + (1-\beta) \overline{g^2}^{\,\text{columns}} \quad
        C \leftarrow \beta C + (1-\beta) \overline{g^2}^{\,\text{rows}} \quad
        u = g \Big/ \max\!\Big(\sqrt{\frac{R C}{\max(\overline{R}, \epsilon_1)}}, \epsilon_1\Big)

    .. math::
        p \leftarrow (1 - \gamma \lambda) p - \min(\gamma, t^{-1/2}) \max(\epsilon_2, \operatorname{rms}(p))
        \frac{u}{\max(1, \operatorname{rms}(u) / d)}

    Args:
        params: parameters, named parameters or param groups, as torch takes them.
        lr: the largest relative step, >= 0: a share of the parameter's root mean square; a float or a tensor of one
            element.
        beta2_decay: the exponent tau by which the weight of a new gradient falls, <= 0.
        eps: the floor of what the gradient is divided by, >= 0 or None for the distance from 1 to the next number of
            the parameter's dtype; and the floor of the parameter's root mean square, >= 0.
        d: the largest root mean square of an update before the step size, >= 1.
        weight_decay: decay of the parameter itself, times lr, >= 0.
        foreach: accepted; it changes nothing.
        maximize: climb instead of descend.
        fused: None takes the kernels where they can serve, which is for contiguous fp32 and fp64 parameters on the CPU;
            True demands them; False takes the torch path, one parameter after the other.
        options: of those that every optimizer has, `amp_scaling`.

    Shape: parameters of any shape and strides whose elements do not share memory, of any real floating dtype. The
        states have the parameter's dtype: "row_var" its shape with a last dimension of 1 and "col_var" with a last but
        one of 1, or "variance" its shape where it has fewer than two dimensions.

    Raises:
        ValueError: an argument is out of its range, or an option is not supported.

    Source: Shazeer & Stern 2018, Alg. 4 and 5 (arXiv:1804.04235), with means for sums and with lr and eps as
        torch.optim.Adafactor has them; defaults as there.
    """

    steps_in_state = True
    takes_control = False
    implementation_keys = ("foreach", "fused")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        if fused is not None:
            defaults["fused"] = fused
        check_options("Adafactor", options)
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        if not scalar("beta2_decay", group["beta2_decay"]) <= 0:
            raise ValueError(f"beta2_decay: expected <= 0, got {group['beta2_decay']}")
        if group["eps"][0] is not None:
            check_range("eps[0]", group["eps"][0], 0)
        check_range("eps[1]", group["eps"][1], 0)
        check_range("d", group["d"], 1)
        check_range("weight_decay", group["weight_decay"], 0)

    @property
    def choices(self) -> list[backend.Choice]:
        """The backend and the reason, a param group: that of its first parameter on the torch path, if there is one."""
        chosen = []
        for group in self.param_groups:
            each = [self._choice(p, group) for p in group["params"]]
            torch_path = [c for c in each if c.backend == "torch"]
            chosen += torch_path[:1] or each[:1] or [backend.Choice("native", "no parameters")]
        return chosen

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """The state and param groups, as torch.optim.Optimizer gives them; `portable` changes nothing."""
        return super().state_dict()

    @torch.no_grad()
    def _run(self, inv_scale: float) -> None:
        seen: set[int] = set()
        native: list[tuple[Tensor, int]] = []
        slow: list[tuple[Tensor, int]] = []
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is None or id(param) in seen:
                    continue
                seen.add(id(param))
                where = f"Adafactor: param_groups[{index}]['params'][{i}]"
                choice = self._choice(param, group)
                self._check(param, where)
                if choice.backend == "native":
                    native.append((param, index))
                else:
                    slow.append((param, index))
                    if choice.reason not in backend.ASKED_FOR:
                        self.warn_once(choice.reason)
        held: set[int] = set()
        for param, _ in native + slow:
            self._complete(param, held)
        if native:
            self._step_native(native, inv_scale)
        for param, index in slow:
            self._step_one(param, self.param_groups[index], inv_scale)

    def _choice(self, param: Tensor, group: dict[str, Any]) -> backend.Choice:
        return backend.select(param, fused=group.get("fused"), unfit=self._unfit(param))

    def _unfit(self, param: Tensor) -> str:
        """Why Adafactor's kernels, unlike other optimizers', cannot take a parameter; or nothing."""
        if param.device.type != "cpu":
            return f"there are no kernels for Adafactor on device {param.device}"
        if param.dtype in LOW_PRECISION:
            return f"there are no kernels for Adafactor with {param.dtype} parameters"
        if param.layout == torch.strided and not param.is_contiguous():
            return "there are no kernels for Adafactor with parameters that are not contiguous"
        state = self.state.get(param, {})
        for name in state_shapes(param):
            value = state.get(name)
            if value is not None and value.dtype != param.dtype:
                return f"Adafactor's kernels keep a state in its parameter's dtype, and {name!r} is {value.dtype}"
        return ""

    def _check(self, param: Tensor, where: str) -> None:
        """Raise UnfitError, before anything is written, where a parameter cannot be stepped."""
        check_gradient(param, where)
        if param.is_complex():
            raise UnfitError(f"{where}: it is complex, which Adafactor does not take; pass its torch.view_as_real")
        state = self.state.get(param, {})
        for name, shape in state_shapes(param).items():
            value = state.get(name)
            if value is not None and (list(value.shape) != shape or value.device != param.device):
                raise UnfitError(
                    f"{where}: its state {name!r} has shape {tuple(value.shape)} on {value.device}, "
                    f"expected {tuple(shape)} on {param.device}"
                )

    def _complete(self, param: Tensor, seen: set[int]) -> None:
        """Make the state that a parameter lacks, and copies of what lies apart or what another parameter has too."""
        state = self.state[param]
        step = lay_out_number(state.get("step", 0.0), seen)
        state["step"] = step.view(()) if step.ndim else step
        for name, shape in state_shapes(param).items():
            value = state.get(name)
            if value is None:
                state[name] = torch.zeros_like(param) if name == "variance" else param.new_zeros(shape)
            elif id(value) in seen or not value.is_contiguous():
                state[name] = value.clone(memory_format=torch.contiguous_format)
            seen.add(id(state[name]))

    def _step_native(self, work: list[tuple[Tensor, int]], inv_scale: float) -> None:
        """Step contiguous fp32 and fp64 parameters, each given with the number of its group."""
        control = torch.zeros(CONTROL_HEAD + CONTROL_ROW * len(self.param_groups), dtype=torch.float64, device="cpu")
        control[INV_SCALE] = inv_scale
        rows = control[CONTROL_HEAD:].view(-1, CONTROL_ROW)
        for row, group in zip(rows, self.param_groups, strict=True):
            eps1, eps2 = group["eps"]
            hypers = (group["lr"], group["beta2_decay"], -1.0 if eps1 is None else eps1, eps2, group["d"])
            values = torch.tensor([*map(float, hypers), float(group["weight_decay"])], dtype=torch.float64)
            row[0] = -1.0 if group["maximize"] else 1.0
            row[CONTROL_HYPERS : CONTROL_HYPERS + len(values)] = values
        params = [param for param, _ in work]
        nothing = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
        row_vars, col_vars, steps = [], [], []
        for param in params:
            state = self.state[param]
            row_vars.append(state["row_var"] if param.ndim >= 2 else nothing[param.dtype])
            col_vars.append(state["col_var" if param.ndim >= 2 else "variance"])
            steps.append(state["step"])
        grads = [param.grad.resolve_neg() for param in params if param.grad is not None]
        groups = [index for _, index in work]
        torch.ops.pytrain._adafactor.default(params, grads, row_vars, col_vars, steps, groups, control)
        torch.autograd.graph.increment_version([*params, *row_vars, *col_vars, *steps])

    def _step_one(self, param: Tensor, group: dict[str, Any], inv_scale: float) -> None:
        """Step one parameter by torch; in fp32 where its dtype has fewer bits."""
        state = self.state[param]
        state["step"] += 1
        if not param.numel():
            return
        eps1, eps2 = group["eps"]
        wide = torch.float32 if param.dtype in LOW_PRECISION else param.dtype
        kept = [state[name] for name in state_shapes(param)]
        variances = [v.to(wide) for v in kept]
        assert param.grad is not None
        u = adafactor(
            param.to(wide),
            param.grad.to(wide) * (-inv_scale if group["maximize"] else inv_scale),
            *variances,
            t=float(state["step"]),
            lr=float(group["lr"]),
            beta2_decay=float(group["beta2_decay"]),
            eps1=torch.finfo(param.dtype).eps if eps1 is None else float(eps1),
            eps2=float(eps2),
            d=float(group["d"]),
            weight_decay=float(group["weight_decay"]),
        )
        for value, new in zip(kept, variances, strict=True):
            if new is not value:
                value.copy_(new)
        param.copy_(param.to(wide) - u)


def check_options(name: str, options: Options) -> None:
    """Raise ValueError for an option that asks for something and that this optimizer does not have."""
    for option, value in options.items():
        if option not in SUPPORTED and value not in (None, False, "nearest"):
            raise ValueError(f"{option}: {name} does not support it; expected it unset, got {value!r}")


def check_gradient(param: Tensor, where: str) -> None:
    """Raise UnfitError where a gradient does not fit its parameter, or the parameter's elements share memory."""
    grad = param.grad
    assert grad is not None
    if grad.shape != param.shape:
        raise UnfitError(f"{where}: its gradient has shape {tuple(grad.shape)}, expected {tuple(param.shape)}")
    if grad.layout != torch.strided:
        raise UnfitError(f"{where}: its gradient has layout {grad.layout}, which this optimizer does not take")
    check_disjoint(param, where)
