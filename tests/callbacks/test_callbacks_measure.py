"""LearningRateMonitor, Throughput and Profiler: the numbers are those of the run, and what is not known is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import Net, SmallTrainer, rows
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.flop_counter import FlopCounterMode

from pytrain.callbacks import LearningRateMonitor, ModelCheckpoint, Profiler, Throughput, measure


def lines_of(folder: Path, callback: Any, **settings: Any) -> list[dict[str, float]]:
    schedule, module = settings.pop("make_schedule", None), settings.pop("module", None) or Net()
    trainer = SmallTrainer(folder, [callback], **settings)
    trainer.fit(module, None, schedule)
    return trainer.lines


def halved(optimizer: torch.optim.Optimizer) -> StepLR:
    return StepLR(optimizer, 1, 0.5)


def test_the_rate_is_in_each_line_of_a_step_and_once_for_each_step(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, LearningRateMonitor(), epochs=2, scores=[1.0, 2.0], make_schedule=halved)
    assert [line.get("lr-AdamW") for line in lines if "loss" in line] == [0.05 * 0.5**step for step in range(1, 9)]
    assert not [line for line in lines if "val_loss" in line and "lr-AdamW" in line]


def test_the_rate_of_an_epochs_start_is_in_its_first_line(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, LearningRateMonitor("epoch"), epochs=2, make_schedule=halved)
    found = {line["step"]: line["lr-AdamW"] for line in lines if "lr-AdamW" in line}
    assert found == {1: 0.05, 5: 0.05 * 0.5**4}


def test_groups_and_optimizers_have_names_of_their_own(tmp_path: Path) -> None:
    net = Net()
    first, second = net.net[0], net.net[2]
    trainer = SmallTrainer(tmp_path, [])
    trainer.optimizers = [
        torch.optim.SGD([{"params": first.weight, "lr": 0.1}, {"params": first.bias, "lr": 0.2, "name": "bias"}], 0.3),
        torch.optim.AdamW(second.parameters(), lr=torch.tensor(0.5), betas=(0.75, 0.9), weight_decay=0.25),
        torch.optim.SGD(second.parameters(), lr=0.125, momentum=0.5),
    ]
    trainer.global_step = 1
    metrics: dict[str, float] = {}
    LearningRateMonitor(log_momentum=True, log_weight_decay=True).log_metrics(trainer, net, metrics)
    assert metrics == {
        "lr-SGD/pg1": 0.1,
        "lr-SGD/pg1-momentum": 0.0,
        "lr-SGD/pg1-weight_decay": 0.0,
        "lr-SGD/bias": 0.2,
        "lr-SGD/bias-momentum": 0.0,
        "lr-SGD/bias-weight_decay": 0.0,
        "lr-AdamW": 0.5,
        "lr-AdamW-momentum": 0.75,
        "lr-AdamW-weight_decay": 0.25,
        "lr-SGD-1": 0.125,
        "lr-SGD-1-momentum": 0.5,
        "lr-SGD-1-weight_decay": 0.0,
    }


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "perf_counter", clock)
    return clock


class Timed(Net):
    """Each training step takes two seconds."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.clock.now += 2.0
        return super().training_step(batch, batch_idx)


def test_samples_and_tokens_a_second_are_what_the_clock_says(tmp_path: Path, clock: Clock) -> None:
    loader = [{"tokens": x, "y": y} for x, y in rows(3)] + [{"tokens": x, "y": y} for x, y in rows(1, size=2)]
    lines = lines_of(tmp_path, Throughput(), epochs=1, loader=loader, module=Timed(clock))
    speeds = [(line["device/samples_per_second"], line["device/tokens_per_second"]) for line in lines]
    assert speeds == [(3.0, 12.0)] * 3 + [(1.0, 4.0)]
    assert not any("flops" in name or "mfu" in name for line in lines for name in line)


def test_validation_takes_no_time_and_its_line_has_no_speed(tmp_path: Path, clock: Clock) -> None:
    class Slow(Throughput):
        def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
            super().on_validation_epoch_start(trainer, module)
            clock.now += 50.0

    lines = lines_of(tmp_path / "1", Slow(), epochs=2, scores=[1.0, 1.0], module=Timed(clock))
    assert [line.get("device/samples_per_second") for line in lines] == [3.0, 3.0, 3.0, 3.0, None] * 2
    few = lines_of(tmp_path / "2", Slow(), epochs=2, scores=[1.0, 1.0], module=Timed(clock), log_every=3)
    assert [line.get("device/samples_per_second") for line in few] == [3.0, None, 3.0, None]


def test_tokens_are_left_out_where_the_batch_has_none_and_counted_by_a_function(tmp_path: Path, clock: Clock) -> None:
    assert "device/tokens_per_second" not in lines_of(tmp_path, Throughput(), module=Timed(clock))[0]
    counted = Throughput(tokens=lambda batch: 10, batch_size=lambda batch: 4)
    line = lines_of(tmp_path, counted, module=Timed(clock))[0]
    assert line["device/tokens_per_second"] == 5.0 and line["device/samples_per_second"] == 2.0


def test_mfu_is_the_share_of_the_peak_that_was_given(tmp_path: Path, clock: Clock) -> None:
    given = Throughput(flops_per_batch=6e3, peak_flops=1e4)
    line = lines_of(tmp_path, given, module=Timed(clock))[0]
    assert line["device/flops_per_second"] == 3e3 and line["device/mfu"] == 0.3
    unknown = Throughput(flops_per_batch=lambda batch: 1e3 * len(batch[0]))
    line = lines_of(tmp_path, unknown, module=Timed(clock))[0]
    assert line["device/flops_per_second"] == 3e3 and "device/mfu" not in line


def test_counted_flops_are_those_of_the_layers_forward_and_backward(tmp_path: Path, clock: Clock) -> None:
    """Linear layers of 4 -> 8 -> 1: 2 m n k forward, twice that backward, but the input takes no gradient."""
    line, *_, last = lines_of(
        tmp_path, Throughput(count_flops=True), module=Timed(clock), loader=rows(2) + rows(1, size=3)
    )
    first, second = 2 * 4 * 8, 2 * 8 * 1
    a_row = 2 * first + 3 * second
    assert line["device/flops_per_second"] == 6 * a_row / 2.0
    assert last["device/flops_per_second"] == 3 * a_row / 2.0


def test_counting_ends_with_the_run_that_fails(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise RuntimeError("broken")

    trainer = SmallTrainer(tmp_path, [Throughput(count_flops=True)])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(Broken())
    with FlopCounterMode(display=False) as counter:
        nn.Linear(2, 3)(torch.ones(1, 2))
    assert counter.get_total_flops() == 12
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 PCIe", "fp16-true", 756.0e12),
        ("NVIDIA A100-SXM4-40GB", "bf16-true", 312.0e12),
        ("NVIDIA L4", "bf16-mixed", 121.0e12),
        ("NVIDIA L40S", "bf16-mixed", 362.05e12),
        ("NVIDIA H100 80GB HBM3", "32", None),
        ("NVIDIA GeForce GTX 1080", "fp16-mixed", None),
    ],
)
def test_a_peak_is_taken_only_where_it_is_known(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert measure._peak_of(torch.device("cuda"), precision) == peak
    assert measure._peak_of(torch.device("cpu"), precision) is None


def traced_steps(path: Path) -> int:
    events = json.loads(path.read_text())["traceEvents"]
    return sum(
        event["name"].startswith("Optimizer.step#") and event.get("cat") == "user_annotation" for event in events
    )


class TorchNet(Net):
    """With torch's optimizer, whose steps stand in a trace by name."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    profiler = Profiler(2, 4)
    SmallTrainer(tmp_path, [profiler]).fit(TorchNet())
    assert profiler.path == tmp_path / "traces" / "steps-2-4-rank0.json"
    assert traced_steps(profiler.path) == 3
    assert [path.name for path in profiler.path.parent.iterdir()] == [profiler.path.name]


def test_a_trace_begins_with_the_run_and_ends_with_it(tmp_path: Path) -> None:
    profiler = Profiler(1, 99)
    SmallTrainer(tmp_path, [profiler], epochs=1).fit(TorchNet())
    assert profiler.path is not None and profiler.path.name == "steps-1-4-rank0.json"
    assert traced_steps(profiler.path) == 4


def test_a_run_that_fails_leaves_its_trace(tmp_path: Path) -> None:
    profiler = Profiler(2, 9)
    with pytest.raises(KeyboardInterrupt):
        SmallTrainer(tmp_path, [profiler], kill_at=6).fit(TorchNet())
    assert profiler.path is not None and profiler.path.name == "steps-2-6-rank0.json"


def test_a_run_that_resumes_behind_the_steps_traces_nothing(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint()
    SmallTrainer(tmp_path, [checkpoint, Profiler(98, 99)], epochs=1).fit(Net())
    profiler = Profiler(2, 3)
    trainer = SmallTrainer(tmp_path, [ModelCheckpoint(), profiler], epochs=2)
    trainer.fit(Net(), checkpoint.best_model_path)
    assert trainer.global_step == 8 and profiler.path is None and not (tmp_path / "traces").exists()


def test_only_the_ranks_that_were_asked_for_trace(tmp_path: Path) -> None:
    profiler = Profiler(1, 2)
    SmallTrainer(tmp_path, [profiler], rank=1).fit(Net())
    assert profiler.path is None and not (tmp_path / "traces").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearningRateMonitor("batch"), "logging_interval must be 'step' or 'epoch', got 'batch'"),
        (lambda: Throughput(flops_per_batch=1.0, count_flops=True), "leave one of the two out"),
        (lambda: Throughput(peak_flops=0.0), "peak_flops must be > 0, got 0.0"),
        (lambda: Throughput(flops_per_batch=-1), "flops_per_batch must be > 0, got -1"),
        (lambda: Profiler(0, 3), "expected 1 <= first_step <= last_step, got first_step=0, last_step=3"),
        (lambda: Profiler(4, 3), "got first_step=4, last_step=3"),
    ],
)
def test_arguments_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
