"""Muon: the orthogonalization of matrices, then the optimizer, which steps all other parameters by AdamW."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pytrain import backend
from pytrain.optim.adafactor import check_gradient, check_options
from pytrain.optim.adamw import AdamW
from pytrain.optim.base import FusedOptimizer, Options, check_range, scalar
from pytrain.optim.states import UnfitError

if TYPE_CHECKING:
    from typing_extensions import Unpack

ADJUSTMENTS = (None, "original", "match_rms_adamw")
BATCH = 2**20  # elements of the matrices that are orthogonalized at once; small products alone leave cores idle
ADAMW = {"adamw_lr_ratio": 1.0, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8, "adamw_weight_decay": None}


def has_bf16_products(device: torch.device) -> bool:
    """Whether matrix products in bf16 are fast there; on a CPU without instructions for them they are not."""
    if device.type != "cpu":
        return True
    mkldnn = bool(torch._C._has_mkldnn)  # without it, torch.ops.mkldnn is empty
    return mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, *, dtype: torch.dtype
) -> Tensor:
    """Move the singular values of each matrix close to 1 by Newton-Schulz steps, in bf16.

    Args:
        coefficients: a, b, c of the polynomial a x + b x^3 + c x^5 that a step applies to every singular value.
        steps: how many.
        eps: the least norm that a matrix is divided by.
        dtype: what products are computed in before they are rounded to bf16: torch.bfloat16, or torch.float32 for
            nearly the same numbers where products in bf16 are slow. torch.float64 rounds nothing, for tests.

    Shape: matrices (n, rows, cols), of any floating dtype; returns the same shape in `dtype`.
    Source: Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks.
    """
    a, b, c = coefficients

    def rounded(product: Tensor) -> Tensor:
        return product.bfloat16().float() if dtype == torch.float32 else product

    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.to(dtype if dtype == torch.float64 else torch.bfloat16)
    x = (x / x.flatten(1).norm(dim=1).clamp(min=eps).view(-1, 1, 1)).to(dtype)
    x = x.mT if tall else x
    for _ in range(steps):
        gram = rounded(x @ x.mT)
        # torch 2.13's baddbmm is wrong in bf16 for alpha=0, on CPUs that have such products.
        polynomial = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram)
        x = rounded(torch.baddbmm(x, polynomial, x, beta=a))
    return x.mT if tall else x


def adjusted(lr: float, how: str | None, rows: int, cols: int) -> float:
    """The step size of a matrix of this shape."""
    if how == "match_rms_adamw":
        return lr * 0.2 * math.sqrt(max(rows, cols))
    return lr * math.sqrt(max(1.0, rows / max(1, cols)))


class Muon(FusedOptimizer):
    r"""Muon: a drop-in replacement for torch.optim.Muon that takes all parameters of a model.

    The momentum of a matrix is replaced by the nearest orthogonal matrix, about, so that all its directions step by
    the same amount. For the matrices of hidden layers; its state is half of AdamW's. Parameters that are not matrices
    are stepped by AdamW. Embeddings and output layers are matrices, but should be stepped by AdamW too: put them into a
    param group with `"use_muon": False`.

    .. math::
        B \leftarrow \mu B + (1-\mu) g \quad \tilde B = (1-\mu) g + \mu B \;(\text{without Nesterov: } B) \quad
        p \leftarrow (1 - \gamma \lambda) p - \gamma s \operatorname{NS}(\tilde B)

    with :math:`\operatorname{NS}` the Newton-Schulz steps and :math:`s = \sqrt{\max(1, n/m)}` for an (n, m) matrix, or
    :math:`0.2 \sqrt{\max(n, m)}`, with which the root mean square of an update is about that of AdamW's.

    Args:
        params: parameters, named parameters or param groups, as torch takes them. All arguments from `lr` to
            `adamw_weight_decay` can be given for a group.
        lr: step size, >= 0; a float or a tensor of one element.
        weight_decay: decay of the parameter itself, times lr, >= 0.
        momentum: decay of the momentum, >= 0.
        nesterov: look one momentum step ahead.
        ns_coefficients: the three coefficients of the Newton-Schulz polynomial.
        eps: the least norm that a momentum is divided by.
        ns_steps: Newton-Schulz steps, < 100.
        adjust_lr_fn: which s: "original" or None for the first, "match_rms_adamw" for the second. With the latter, lr
            and weight_decay of AdamW serve for both kinds of parameters.
        use_muon: None steps what has two dimensions by Muon and the rest by AdamW, False all by AdamW, and True takes
            nothing but matrices.
        adamw_lr_ratio: AdamW's step size as a multiple of lr, >= 0, so that a scheduler moves both; None for 1.
        adamw_betas: as in `AdamW`; None for (0.9, 0.95).
        adamw_eps: as in `AdamW`; None for 1e-8.
        adamw_weight_decay: as in `AdamW`; None for weight_decay.
        fused: as in `Adam`, for the parameters that AdamW steps; matrix products are always torch's.
        options: of those that every optimizer has, `amp_scaling`.

    Shape: matrices of any real floating dtype, and others as in `Adam`; elements must not share memory. Matrices have
        one state, "momentum_buffer", others those of `AdamW`; both in the parameter's dtype.

    Raises:
        ValueError: an argument is out of its range, an option is not supported, or with `use_muon=True` a parameter
            is not a matrix.

    Source: Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks
        (https://kellerjordan.github.io/posts/muon/); Liu et al. 2025 for weight decay and "match_rms_adamw"
        (arXiv:2502.16982). Defaults as in torch.optim.Muon; adamw_betas and the shared weight_decay as in the latter.
    """

    implementation_keys = ("fused",)
    takes_control = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        use_muon: bool | None = None,
        adamw_lr_ratio: float | None = None,
        adamw_betas: tuple[float | Tensor, float | Tensor] | None = None,
        adamw_eps: float | None = None,
        adamw_weight_decay: float | None = None,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        ours = {
            "use_muon": use_muon,
            "adamw_lr_ratio": adamw_lr_ratio,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
            "fused": fused,
        }
        defaults.update({key: value for key, value in ours.items() if value is not None})  # else groups are torch's
        self._adamw: AdamW | None = None
        check_options("Muon", options)
        super().__init__(params, defaults, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0)
        check_range("weight_decay", group["weight_decay"], 0)
        check_range("momentum", group["momentum"], 0)
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"ns_coefficients: expected three numbers, got {group['ns_coefficients']}")
        if not group["ns_steps"] < 100:
            raise ValueError(f"ns_steps: expected < 100, got {group['ns_steps']}")
        if group["adjust_lr_fn"] not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn: expected one of {ADJUSTMENTS}, got {group['adjust_lr_fn']!r}")
        check_range("adamw_lr_ratio", setting(group, "adamw_lr_ratio"), 0)
        for i, beta in enumerate(setting(group, "adamw_betas")):
            check_range(f"adamw_betas[{i}]", beta, 0, 1)
        check_range("adamw_eps", setting(group, "adamw_eps"), 0)
        if setting(group, "adamw_weight_decay") is not None:
            check_range("adamw_weight_decay", group["adamw_weight_decay"], 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch.optim.Optimizer does.

        Raises:
            ValueError: a hyperparameter of the group is out of its range, or with `use_muon=True` a parameter is not
                a matrix.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for i, param in enumerate(group["params"]):
            if group.get("use_muon") and param.ndim != 2:
                self.param_groups.pop()
                raise ValueError(
                    f"use_muon: expected matrices, but params[{i}] of the group has shape {tuple(param.shape)}; "
                    "leave use_muon unset to step it by AdamW"
                )

    @property
    def choices(self) -> list[backend.Choice]:
        """The backend and the reason, a param group: that of its first parameter on the torch path, if there is one."""
        by_adamw = self._others().choices
        by_muon = backend.Choice("torch", "Newton-Schulz steps by torch's matrix products")
        return [
            by_muon if any(is_muons(p, group) for p in group["params"]) else choice
            for group, choice in zip(self.param_groups, by_adamw, strict=True)
        ]

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """The state and param groups, as torch.optim.Optimizer gives them; `portable` changes nothing."""
        return super().state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adamw = None

    def _others(self) -> AdamW:
        """The AdamW of the parameters that are not Muon's: a group for each of ours, and the same state."""
        members = [[p for p in group["params"] if not is_muons(p, group)] for group in self.param_groups]
        adamw = self._adamw
        if adamw is None or not same_objects(members, [group["params"] for group in adamw.param_groups]):
            adamw = self._adamw = AdamW([{"params": params} for params in members])
        adamw.state = self.state
        for group, theirs in zip(self.param_groups, adamw.param_groups, strict=True):
            decay = setting(group, "adamw_weight_decay")
            beta1, beta2 = setting(group, "adamw_betas")
            wanted = {
                "lr": scalar("lr", group["lr"]) * setting(group, "adamw_lr_ratio"),
                "betas": (float(beta1), float(beta2)),
                "eps": setting(group, "adamw_eps"),
                "weight_decay": group["weight_decay"] if decay is None else decay,
                "fused": group.get("fused"),
            }
            theirs.update({key: value for key, value in wanted.items() if theirs[key] != value})
        return adamw

    @torch.no_grad()
    def _run(self, inv_scale: float) -> None:
        work: list[tuple[dict[str, Any], list[Tensor]]] = []
        checked: set[int] = set()
        for index, group in enumerate(self.param_groups):
            matrices = []
            for i, param in enumerate(group["params"]):
                if param.grad is None or id(param) in checked:
                    continue
                checked.add(id(param))
                self._check(param, group, f"Muon: param_groups[{index}]['params'][{i}]")
                if is_muons(param, group):
                    matrices.append(param)
            work.append((group, matrices))
        adamw = self._others()
        if any(group["params"] for group in adamw.param_groups):
            adamw._run(inv_scale)
        for group, matrices in work:
            for batch in batches(matrices):
                self._step_batch(batch, group, inv_scale)

    def _check(self, param: Tensor, group: dict[str, Any], where: str) -> None:
        """Raise UnfitError, before anything is written, where a parameter cannot be stepped."""
        check_gradient(param, where)
        if not is_muons(param, group):
            return
        if param.ndim != 2:
            raise UnfitError(f"{where}: use_muon=True, but it has shape {tuple(param.shape)}, which is not a matrix's")
        if param.is_complex():
            raise UnfitError(f"{where}: it is complex, which Muon does not take; set use_muon=False for its group")
        buffer = self.state.get(param, {}).get("momentum_buffer")
        if buffer is not None and (buffer.shape != param.shape or buffer.device != param.device):
            raise UnfitError(
                f"{where}: its state 'momentum_buffer' has shape {tuple(buffer.shape)} on {buffer.device}, "
                f"expected {tuple(param.shape)} on {param.device}"
            )

    def _step_batch(self, params: list[Tensor], group: dict[str, Any], inv_scale: float) -> None:
        """Step matrices of one shape."""
        lr, momentum = float(group["lr"]), float(group["momentum"])
        directions = []
        for param in params:
            assert param.grad is not None
            state = self.state[param]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            buffer = state["momentum_buffer"]
            grad = param.grad.to(buffer.dtype)
            grad = grad if inv_scale == 1.0 else grad * inv_scale
            buffer.lerp_(grad, 1 - momentum)
            directions.append(grad.lerp(buffer, momentum) if group["nesterov"] else buffer)
        device, (rows, cols) = params[0].device, params[0].shape
        updates = orthogonalize(
            torch.stack(directions),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
            dtype=torch.bfloat16 if has_bf16_products(device) else torch.float32,
        )
        step_size = adjusted(lr, group["adjust_lr_fn"], rows, cols)
        for param, update in zip(params, updates, strict=True):
            param.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-step_size)


def setting(group: dict[str, Any], name: str) -> Any:
    """An option of the AdamW part; groups hold only those that were given."""
    value = group.get(name)
    return ADAMW[name] if value is None else value


def is_muons(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether Muon steps the parameter, or else AdamW."""
    use_muon = group.get("use_muon")
    return param.ndim == 2 if use_muon is None else bool(use_muon)


def same_objects(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    """Whether two lists of lists hold the same tensors."""
    return [[id(x) for x in row] for row in a] == [[id(x) for x in row] for row in b]


def batches(matrices: list[Tensor]) -> list[list[Tensor]]:
    """The matrices by shape, dtype and device, in lists of up to BATCH elements; a larger one is on its own."""
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
    for matrix in matrices:
        alike.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(matrix)
    found = []
    for (shape, _, _), members in alike.items():
        count = max(1, BATCH // max(1, shape.numel()))
        found += [members[i : i + count] for i in range(0, len(members), count)]
    return found
