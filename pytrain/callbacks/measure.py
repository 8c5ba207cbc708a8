"""LearningRateMonitor, Throughput and Profiler: what a run does, and at which speed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pytrain.callbacks.base import Callback, StepCount, say
from pytrain.loggers.metrics import batch_size_of

if TYPE_CHECKING:
    from torch.profiler import profile
    from torch.utils.flop_counter import FlopCounterMode

    from pytrain.steps import StepInfo
    from pytrain.trainer import Module, Trainer

# Dense bf16 and fp16 matrix products with fp32 sums, in operations a second, as the makers' data sheets have them.
PEAKS = {
    "H200": 989.4e12,
    "H100 PCIe": 756.0e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "A100": 312.0e12,
    "L40S": 362.05e12,
    "L4": 121.0e12,
}


class LearningRateMonitor(Callback):
    """Adds each param group's learning rate to the metrics: "lr-AdamW", or "lr-AdamW/pg1" where there are several.

    A group with a "name" is called by it, and the second optimizer of a class "AdamW-1". A line of metrics at a step
    that has one with the rates already gets none.

    Args:
        logging_interval: "step": in each line; "epoch": the rates at the epoch's start, in its first line.
        log_momentum: the first of `betas`, or `momentum`, too ("-momentum" is added to the name).
        log_weight_decay: `weight_decay` too ("-weight_decay").

    Raises:
        ValueError: the interval is neither.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] = "step",
        *,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in ("step", "epoch"):
            raise ValueError(
                f"LearningRateMonitor: logging_interval must be 'step' or 'epoch', got {logging_interval!r}"
            )
        self.logging_interval = logging_interval
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay
        self._waiting: dict[str, float] = {}
        self._written_at = -1

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": self._waiting, "written_at": self._written_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._waiting, self._written_at = dict(state_dict["waiting"]), state_dict["written_at"]

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        self._waiting, self._written_at = {}, -1

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        if self.logging_interval == "epoch":
            self._waiting = self._read(trainer)

    def log_metrics(self, trainer: Trainer, module: Module, metrics: dict[str, float]) -> None:
        if self.logging_interval == "epoch":
            metrics |= self._waiting
            self._waiting = {}
        elif trainer.global_step != self._written_at:
            metrics |= self._read(trainer)
            self._written_at = trainer.global_step

    def _read(self, trainer: Trainer) -> dict[str, float]:
        found: dict[str, float] = {}
        seen: Counter[str] = Counter()
        for optimizer in trainer.optimizers:
            kind = type(optimizer).__name__
            name = f"lr-{kind}-{seen[kind]}" if seen[kind] else f"lr-{kind}"
            seen[kind] += 1
            several = len(optimizer.param_groups) > 1
            for i, group in enumerate(optimizer.param_groups, 1):
                full = f"{name}/{group['name']}" if "name" in group else f"{name}/pg{i}" if several else name
                found[full] = float(group["lr"])
                if self.log_momentum and ("betas" in group or "momentum" in group):
                    found[f"{full}-momentum"] = float(group["betas"][0] if "betas" in group else group["momentum"])
                if self.log_weight_decay and "weight_decay" in group:
                    found[f"{full}-weight_decay"] = float(group["weight_decay"])
        return found


class Throughput(Callback):
    """Adds to each line of training metrics the speed since the last one, validation left out.

    All values are those of one rank (rank 0's are what is logged): "device/samples_per_second",
    "device/tokens_per_second", "device/flops_per_second" and "device/mfu", the share of the device's peak. Each is left
    out where it is not known. Lines of metrics wait for the device anyway, so nothing else does.

    Args:
        batch_size: batch -> its samples; None: the first dimension of the first tensor in it.
        tokens: batch -> its tokens; None: of a dict with "tokens", the number of elements of that tensor, or that int.
        flops_per_batch: floating-point operations of a micro-batch forward and backward, or batch -> that number;
            None: not known.
        count_flops: count them in the first micro-batch of the run, by torch.utils.flop_counter (matrix products,
            convolutions and attention, forward and backward); every sample is taken to cost the same.
        peak_flops: the device's floating-point operations a second; None: known for some GPUs in bf16 and fp16.

    Raises:
        ValueError: an argument is out of its range, or flops are both given and to be counted.
    """

    def __init__(
        self,
        *,
        batch_size: Callable[[Any], int] | None = None,
        tokens: Callable[[Any], int] | None = None,
        flops_per_batch: float | Callable[[Any], float] | None = None,
        count_flops: bool = False,
        peak_flops: float | None = None,
    ) -> None:
        if flops_per_batch is not None and count_flops:
            raise ValueError("Throughput: flops_per_batch is given and count_flops=True; leave one of the two out")
        for name, value in (("flops_per_batch", flops_per_batch), ("peak_flops", peak_flops)):
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"Throughput: {name} must be > 0, got {value!r}")
        self._batch_size, self._tokens, self._flops = batch_size, tokens, flops_per_batch
        self._counts, self._peak = count_flops, peak_flops
        self._counter: FlopCounterMode | None = None
        self._counted = 0.0
        self._flops_per_sample: float | None = None
        self._since: float | None = None
        self._pause: float | None = None
        self._done = {"samples": 0.0, "tokens": 0.0, "flops": 0.0}

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        self._since = self._pause = self._flops_per_sample = None
        if self._peak is None:
            self._peak = _peak_of(next(module.parameters()).device, trainer.config.precision)

    def on_train_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> None:
        if self._since is None:
            self._restart()
        if self._counts and self._flops_per_sample is None and self._counter is None:
            from torch.utils.flop_counter import FlopCounterMode

            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        samples = self._samples_in(batch)
        if self._counter is not None:
            self._stop_counting()
            self._flops_per_sample = self._counted / samples
        self._done["samples"] += samples
        self._done["tokens"] += self._tokens_in(batch)
        if self._flops_per_sample is not None:
            self._done["flops"] += self._flops_per_sample * samples
        elif self._flops is not None:
            self._done["flops"] += self._flops(batch) if callable(self._flops) else self._flops

    def on_validation_epoch_start(self, trainer: Trainer, module: Module) -> None:
        self._pause = perf_counter()

    def on_validation_epoch_end(self, trainer: Trainer, module: Module) -> None:
        if self._since is not None and self._pause is not None:
            self._since += perf_counter() - self._pause
        self._pause = None

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        if self._counter is not None:
            self._stop_counting()

    def log_metrics(self, trainer: Trainer, module: Module, metrics: dict[str, float]) -> None:
        if self._since is None or self._pause is not None or not self._done["samples"]:
            return
        seconds = perf_counter() - self._since
        for name, amount in self._done.items():
            if amount and seconds > 0:
                metrics[f"device/{name}_per_second"] = amount / seconds
        if self._done["flops"] and self._peak is not None and seconds > 0:
            metrics["device/mfu"] = self._done["flops"] / seconds / self._peak
        self._restart()

    def _restart(self) -> None:
        self._since = perf_counter()
        self._done = dict.fromkeys(self._done, 0.0)

    def _stop_counting(self) -> None:
        assert self._counter is not None
        self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._counted, self._counter = float(self._counter.get_total_flops()), None

    def _samples_in(self, batch: Any) -> int:
        if self._batch_size is not None:
            return self._batch_size(batch)
        return batch_size_of(batch)

    def _tokens_in(self, batch: Any) -> int:
        if self._tokens is not None:
            return self._tokens(batch)
        found = batch.get("tokens") if isinstance(batch, dict) else None
        if isinstance(found, Tensor):
            return found.numel()
        return found if isinstance(found, int) else 0


def _peak_of(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda" or not precision.startswith(("bf16", "fp16")):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Profiler(Callback):
    """Writes a trace of some steps by torch.profiler, to be looked at in Perfetto or chrome://tracing.

    The file is `traces/steps-<first>-<last>-rank<r>.json` in the trainer's `default_root_dir`.

    Args:
        first_step, last_step: the applied steps to trace, from 1, the last included. A run that resumes behind the
            first begins at once, and one behind the last traces nothing.
        dirpath: another folder.
        ranks: which ranks trace.
        record_shapes, profile_memory, with_stack: as for torch.profiler.profile.

    Attributes:
        path: of the trace, once it is written; None before.

    Raises:
        ValueError: not 1 <= first_step <= last_step.
    """

    def __init__(
        self,
        first_step: int = 4,
        last_step: int = 6,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        ranks: tuple[int, ...] = (0,),
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
    ) -> None:
        if not 1 <= first_step <= last_step:
            raise ValueError(
                f"Profiler: expected 1 <= first_step <= last_step, got first_step={first_step!r}, "
                f"last_step={last_step!r}"
            )
        self._first, self._last, self._ranks = first_step, last_step, ranks
        self._given = None if dirpath is None else Path(dirpath)
        self._options: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
        }
        self._profile: profile | None = None
        self._count, self._begins_at = StepCount(), 0
        self.path: Path | None = None

    @property
    def state_key(self) -> str:
        return f"Profiler({self._first}, {self._last})"

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        self.path = None
        self._count.start(trainer)
        self._begin(trainer)

    def on_train_step_end(self, trainer: Trainer, module: Module, info: StepInfo) -> None:
        self._count.tick()
        if self._profile is None:
            self._begin(trainer)
        elif self._count.reached(trainer, self._last):
            self._end(trainer)
        else:
            self._profile.step()

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        self._end(trainer)

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        self._end(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if self._profile is not None or self.path is not None or trainer.global_rank not in self._ranks:
            return
        count = self._count
        if count.known >= self._last or not count.reached(trainer, self._first - 1) or count.known >= self._last:
            return
        from torch.profiler import ProfilerActivity, profile

        devices = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *devices], **self._options)
        self._begins_at = self._count.known + 1
        self._profile.start()

    def _end(self, trainer: Trainer) -> None:
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        folder = trainer.default_root_dir / "traces" if self._given is None else self._given
        folder.mkdir(parents=True, exist_ok=True)
        last = min(self._last, max(trainer.global_step, self._begins_at))
        path = folder / f"steps-{self._begins_at}-{last}-rank{trainer.global_rank}.json"
        temporary = path.with_name(f".{path.name}.tmp.json")
        running.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
        self.path = path
        say(trainer, f"Profiler: {path}")
