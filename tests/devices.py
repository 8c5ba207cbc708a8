"""Where the suites of the CPU's kernels put their tensors: PYTRAIN_TEST_DEVICE names the default device of a test run.

`cpu`, as without it; `cuda`; or `second`, with which a machine without a GPU stands in for one: all memory is the
CPU's, but a tensor counts as being elsewhere unless the test says device="cpu", and what CUDA refuses is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

CHOICES = ("cpu", "cuda", "second")
CHOSEN = os.environ.get("PYTRAIN_TEST_DEVICE", "cpu")
HOST, SECOND = torch.device("cpu"), torch.device("cpu", 0)  # torch itself takes both for the CPU
DEVICE = {"cuda": torch.device("cuda", 0), "second": SECOND}.get(CHOSEN, HOST)

# Why tests do not run there, and their names.
HOST_ONLY = {
    "threads and instruction sets are the CPU's": (
        "test_all_levels_and_thread_counts_give_the_same_bits",
        "test_all_levels_and_threads_give_the_same_bits",
        "test_the_norm_has_the_same_bits_for_any_threads_and_level",
        "test_threads_and_instruction_sets_change_no_bit",
    ),
    "Adafactor's own loop is the CPU's": (r"test_optimizers_with_loops_of_their_own_step_and_skip_too\[adafactor\]",),
    "the host learns of the loss scale later, and raises then (tests/simt/test_remote.py)": (
        "test_a_copy_goes_on_by_itself",
        "test_the_error_comes_only_at_the_floor",
        "test_a_clean_step_begins_the_count_anew",
        "test_a_static_scale_is_its_own_floor_and_never_moves",
        "test_a_floor_that_fp32_rounds_is_a_floor_too",
        "test_the_error_names_the_first_bad_parameter",
        "test_what_unscale_found_is_never_blamed_on_another_parameter",
        "test_the_error_knows_its_optimizer_when_their_order_changes",
    ),
    "a skipped first step has made its states, at zero: the host does not know that it is skipped": (
        r"test_a_step_is_whole_or_nothing\[.*-kernels\]",
        r"test_a_skip_leaves_everything_bit_for_bit\[.*-kernels\]",
        r"test_a_scale_near_or_at_zero_makes_nothing_nan\[None-.*-pytrain.AdamW\]",
        r"test_a_skip_before_the_first_step_makes_no_state\[(cautiouslion|lars|lion)\]",
        r"test_b13_any_found_inf_but_zero_skips_and_changes_nothing\[(cautiouslion|lars|lion)\]",
    ),
}


def not_second(reason: str) -> Any:
    """A mark for tests that the second device cannot stand in for."""
    return pytest.mark.skipif(CHOSEN == "second", reason=f"PYTRAIN_TEST_DEVICE=second: {reason}")


def randn(*shape: Any, generator: torch.Generator, **options: Any) -> Tensor:
    """torch.randn on the device of the test run: numbers of a generator on the CPU, the same on every device."""
    return there(torch.randn(*shape, generator=generator, device=HOST, **options))


def skip_if_elsewhere(reason: str) -> None:
    """Skip the rest of a test where tensors are not on the CPU."""
    if CHOSEN != "cpu":
        pytest.skip(f"PYTRAIN_TEST_DEVICE={CHOSEN}: {reason}")


def why_not(test: str) -> str:
    """Why a test does not run where tensors are not on the CPU; nothing if it does, or they are."""
    found = (why for why, names in HOST_ONLY.items() if any(re.fullmatch(rf"{name}(\[.*\])?", test) for name in names))
    why = "" if CHOSEN == "cpu" else next(found, "")
    return why and f"PYTRAIN_TEST_DEVICE={CHOSEN}: {why}"


def there(x: Tensor) -> Tensor:
    """A tensor of the CPU on the device of the test run."""
    return x.to(torch.get_default_device())


def choose() -> None:
    """Make what PYTRAIN_TEST_DEVICE names the default device, for the rest of the process.

    Raises:
        pytest.UsageError: it is set to something else, or there is no such device.
    """
    if CHOSEN not in CHOICES:
        raise pytest.UsageError(f"PYTRAIN_TEST_DEVICE: expected one of {', '.join(CHOICES)}, got {CHOSEN!r}")
    if CHOSEN == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("PYTRAIN_TEST_DEVICE=cuda: torch finds no CUDA device here")
    if CHOSEN != "cpu":
        torch.set_default_device(DEVICE)
    if CHOSEN == "second":
        SecondDevice().__enter__()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


class SecondDevice(TorchFunctionMode):
    """Refuses what CUDA refuses for tensors that are not said to be on the CPU; `x.device` says `cpu:0` of these.

    Tensors are on the second device unless they are made with device="cpu", by `cpu()`, or of tensors that were.
    Refused are: tensors of both in one operation, but for those of no dimension; numpy on the second device's memory;
    and a generator of the CPU for numbers there. What `torch.from_numpy` and `torch.load` make is not seen.
    """

    BETWEEN = {"copy_", "_foreach_copy_"} | {  # of pytrain's ops, those that are given numbers of the host too
        f"{name}.default"
        for name in ("_upload", "_copy", "_table_step", "_table_step_pairs", "_table_launch", "_table_launch_pairs")
    }
    TO_NUMPY = {"numpy", "__array__", "__dlpack__"}

    def __init__(self) -> None:
        super().__init__()
        self.host = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            other = func(*args)
            return other if other.type != "cpu" else HOST if args[0] in self.host else SECOND
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            func(*args)
            self.mark(args[0], args[1] in self.host)
            return None
        on_host = self.goes_to_host(name, given, args, kwargs)
        self.refuse(name, given, kwargs, on_host)
        result = func(*args, **kwargs)
        if name in ("to", "cpu") and (args[0] in self.host) != on_host and result is args[0]:
            result = result.clone()
        if on_host:
            for made in tensors_in(result):
                if not any(made is x for x in given):
                    self.mark(made, True)
        return result

    def mark(self, x: Tensor, on_host: bool) -> None:
        """Say where a tensor is."""
        if on_host:
            self.host[x] = True
        else:
            self.host.pop(x, None)

    def goes_to_host(self, name: str, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the result is the CPU's."""
        if name == "cpu":
            return True
        devices = [kwargs["device"]] if kwargs.get("device") is not None else []
        if name == "to":
            devices += [x for x in args[1:] if isinstance(x, torch.device) or (isinstance(x, str) and "cpu" in x)]
            devices += [HOST if x in self.host else SECOND for x in args[1:] if isinstance(x, Tensor)]
        if devices:
            return torch.device(devices[0]) == HOST
        return bool(given) and all(x in self.host for x in given)

    def refuse(self, name: str, given: list[Tensor], kwargs: dict[str, Any], on_host: bool) -> None:
        """Raise what CUDA would raise."""
        here = [x in self.host for x in given if not is_lazy(x) and x.dim()]
        if name not in self.BETWEEN and name != "to" and any(here) and not all(here):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found the second and the CPU")
        if name in self.TO_NUMPY and given[0] not in self.host:
            raise TypeError(f"{name}: the tensor is on the second device; use Tensor.cpu() first")
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and not on_host:
            raise RuntimeError(f"{name}: expected a generator of the second device, found one of the CPU")
