"""EMA and StochasticWeightAveraging against torch's own averages and rates, also over an interruption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import Net, SmallTrainer, rows
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, StepLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from pytrain import ema
from pytrain.callbacks import EMA, Callback, LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging


class Watch(Callback):
    """Keeps the parameters after each step and the learning rate of each step."""

    def __init__(self) -> None:
        self.params: list[list[Tensor]] = []
        self.lrs: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.lrs.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_train_step_end(self, trainer: Any, module: Any, info: Any) -> None:
        self.params.append([p.detach().clone() for p in module.parameters()])


def params_of(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def assert_equal(ours: list[Tensor], others: list[Tensor]) -> None:
    assert len(ours) == len(others) and all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def test_ema_is_that_of_a_loop_which_updates_after_each_step(tmp_path: Path) -> None:
    module, watch = Net(), Watch()
    trainer = SmallTrainer(tmp_path, [EMA(0.9, start_step=2, every=2), watch], skipped=[3])
    trainer.fit(module)
    reference = Net()
    average = ema.EMA(reference, 0.9, start_step=2, every=2)
    for values in watch.params[:2] + watch.params[3:]:
        with torch.no_grad():
            for p, value in zip(reference.parameters(), values, strict=True):
                p.copy_(value)
        average.update()
    with average.swap():
        wanted = params_of(reference)
    with trainer.ema.swap():
        assert_equal(params_of(module), wanted)
    assert_equal(params_of(module), watch.params[-1])


def test_ema_goes_into_the_module_at_the_end_where_asked_for(tmp_path: Path) -> None:
    module = Net()
    trainer = SmallTrainer(tmp_path, [EMA(0.9, copy_at_end=True)])
    trainer.fit(module)
    ended = params_of(module)
    with trainer.ema.swap():
        assert_equal(params_of(module), ended)
    plain = Net()
    SmallTrainer(tmp_path, []).fit(plain)
    assert not torch.equal(ended[0], params_of(plain)[0])


def test_two_averages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="EMA: the trainer has averages already"):
        SmallTrainer(tmp_path, [EMA(), EMA()]).fit(Net())


def swa_run(folder: Path, swa: StochasticWeightAveraging, module: Net, **settings: Any) -> SmallTrainer:
    path, schedule = settings.pop("ckpt_path", None), settings.pop("make_schedule", None)
    more = settings.pop("callbacks", [])
    trainer = SmallTrainer(folder, [swa, *more], **{"epochs": 6, **settings})
    trainer.fit(module, path, schedule)
    return trainer


@pytest.mark.parametrize(("start", "first"), [(2, 2), (0.5, 3), (0, 0), (1.0, None), (9, None)])
def test_swa_is_the_mean_of_the_epochs_ends(tmp_path: Path, start: Any, first: int | None) -> None:
    module, watch = Net(), Watch()
    swa_run(tmp_path, StochasticWeightAveraging(None, start), module, callbacks=[watch])
    ends = watch.params[3::4]
    assert len(ends) == 6
    if first is None:
        assert_equal(params_of(module), ends[-1])
        return
    for p, *values in zip(module.parameters(), *ends[first:], strict=True):
        mean = torch.stack([value.double() for value in values]).mean(dim=0)
        ulp = torch.finfo(torch.float32).eps * mean.abs().max()
        assert (p.double() - mean).abs().max() <= 2 * len(values) * ulp


def test_lines_of_metrics_have_the_rate_of_swa_and_not_of_the_schedule(tmp_path: Path) -> None:
    """A schedule has moved the rate when a step's line is written."""
    swa, monitor = StochasticWeightAveraging(0.25, 1, 0), LearningRateMonitor()
    trainer = swa_run(tmp_path, swa, Net(), callbacks=[monitor], epochs=3, make_schedule=lambda o: StepLR(o, 1, 0.5))
    found = [line["lr-AdamW"] for line in trainer.lines]
    assert found == [0.05 * 0.5**step for step in range(1, 5)] + [0.25] * 8


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("annealing", [0, 1, 3])
def test_swa_rates_are_those_of_torchs_swalr(tmp_path: Path, strategy: Any, annealing: int) -> None:
    watch = Watch()
    swa = StochasticWeightAveraging(0.2, 2, annealing, strategy)
    swa_run(tmp_path, swa, Net(), callbacks=[watch], make_schedule=lambda optimizer: StepLR(optimizer, 3, 0.5))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = StepLR(optimizer, 3, 0.5)
    wanted = []
    for _ in range(8):  # steps of the first two epochs
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    swalr = SWALR(optimizer, 0.2, annealing, strategy)
    if annealing == 0:
        swalr.step()
    for _ in range(4):
        wanted += [optimizer.param_groups[0]["lr"]] * 4
        swalr.step()
    assert watch.lrs == pytest.approx(wanted, rel=1e-12)


def test_swa_takes_a_rate_for_each_group_and_a_tensor_stays_one(tmp_path: Path) -> None:
    class Two(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            layers = self.net[0], self.net[2]
            return torch.optim.SGD([{"params": layer.parameters(), "lr": torch.tensor(0.05)} for layer in layers])

    module = Two()
    trainer = swa_run(tmp_path, StochasticWeightAveraging([0.25, 0.5], 2, 0), module, epochs=3)
    lrs = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert all(isinstance(lr, Tensor) for lr in lrs) and [lr.item() for lr in lrs] == [0.25, 0.5]
    with pytest.raises(ValueError, match="swa_lrs has 3 values, the optimizers have 2 param groups"):
        swa_run(tmp_path, StochasticWeightAveraging([0.1, 0.2, 0.3], 2), Two())


def test_swa_renews_batchnorm_as_torchs_update_bn(tmp_path: Path) -> None:
    module, watch = Net(norm=True), Watch()
    swa_run(tmp_path, StochasticWeightAveraging(0.1, 2), module, callbacks=[watch])
    reference = AveragedModel(copy.deepcopy(module.net))
    loader = rows()
    update_bn(loader, reference)
    for name, buffer in reference.module.named_buffers():
        assert torch.equal(buffer, dict(module.net.named_buffers())[name]), name
    assert module.net[1].momentum == 0.1 and module.training
    plain = Net(norm=True)
    swa_run(tmp_path, StochasticWeightAveraging(0.1, 9), plain)
    assert not torch.equal(plain.net[1].running_mean, module.net[1].running_mean)


@pytest.mark.parametrize(("kill_at", "saves"), [(5, 5), (13, 5), (18, 5), (22, 5), (14, None), (21, None)])
def test_an_interrupted_run_ends_with_the_same_average(tmp_path: Path, kill_at: int, saves: int | None) -> None:
    def run(folder: Path, module: Net, **settings: Any) -> None:
        swa = StochasticWeightAveraging(0.2, 2, 3)
        checkpoint = ModelCheckpoint(every_n_train_steps=saves, save_last=True)
        schedule = lambda optimizer: ConstantLR(optimizer, 0.5, 7)  # noqa: E731
        swa_run(folder, swa, module, callbacks=[checkpoint], make_schedule=schedule, **settings)

    whole = Net(norm=True)
    run(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Net(norm=True), kill_at=kill_at)
    resumed = Net(norm=True)
    run(tmp_path / "cut", resumed, ckpt_path=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"swa_lrs": 0.0}, "swa_lrs must be finite numbers > 0 or None, got 0.0"),
        ({"swa_lrs": []}, "swa_lrs must be finite numbers > 0"),
        ({"swa_lrs": 0.1, "swa_epoch_start": 1.5}, "swa_epoch_start must be an int >= 0 or a share"),
        ({"swa_lrs": 0.1, "swa_epoch_start": -1}, "swa_epoch_start must be an int >= 0 or a share"),
        ({"swa_lrs": 0.1, "annealing_epochs": -1}, "annealing_epochs must be an int >= 0, got -1"),
        ({"swa_lrs": 0.1, "annealing_strategy": "exp"}, "annealing_strategy must be 'cos' or 'linear', got 'exp'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"StochasticWeightAveraging: {message}"):
        StochasticWeightAveraging(**arguments)


def test_a_share_of_epochs_needs_their_number(tmp_path: Path) -> None:
    trainer = SmallTrainer(tmp_path, [StochasticWeightAveraging(0.1, 0.5)])
    trainer.config.max_epochs = None
    with pytest.raises(ValueError, match="is a share of max_epochs, which the trainer has not"):
        trainer.fit(Net())
