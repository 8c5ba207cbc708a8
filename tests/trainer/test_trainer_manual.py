"""Manual optimization: several optimizers, one loss scale, skips, toggles, averages, checkpoints, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from trainer_cases import assert_same_bits, make_trainer, read_metrics

import pytrain
from pytrain.amp import LossScaler
from pytrain.ema import EMA
from pytrain.optim import SGD, AdamW
from pytrain.trainer import Module, load_checkpoint


def nets(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)
    return generator, nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def small(logits: Tensor) -> Tensor:
    """A loss whose gradients times the first loss scale are fp16 numbers."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.softplus(logits).mean() * 2.0**-6


def losses(d: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    return small(-d(real)) + small(d(made.detach()))


class Gan(Module):
    """A GAN; `bad_d` and `bad_g` are the batches in which one loss is inf, `no_g` those in which only D steps."""

    def __init__(
        self,
        *,
        bad_d: tuple[int, ...] = (),
        bad_g: tuple[int, ...] = (),
        no_g: tuple[int, ...] = (),
        twice: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        toggles: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nets(seed, dtype)
        self.bad_d, self.bad_g, self.no_g, self.twice = bad_d, bad_g, no_g, twice
        self.scales: list[float] = []
        self.toggles = toggles
        self.applied: list[tuple[bool, ...]] = []
        self.needs: set[tuple[bool, bool]] = set()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, noise = batch
        opt_g, opt_d = self.optimizers()  # type: ignore[misc]
        scaler = self.trainer.run.scaler
        self.scales.append(1.0 if scaler is None else scaler.get_scale())
        infos = []
        for i in range(2 if batch_idx in self.twice else 1):
            if self.toggles:
                self.toggle_optimizer(opt_d)
            loss = losses(self.discriminator, real, self.generator(noise))
            self.needs.add((self.generator[0].weight.requires_grad, self.discriminator[0].weight.requires_grad))
            opt_d.zero_grad()
            self.manual_backward(loss * torch.inf if batch_idx in self.bad_d and i == 0 else loss)
            infos.append(opt_d.step(max_norm=0.5))
            self.untoggle_optimizer(opt_d)
        if batch_idx not in self.no_g:
            if self.toggles:
                self.toggle_optimizer(opt_g)
            loss = small(-self.discriminator(self.generator(noise)))
            opt_g.zero_grad()
            self.manual_backward(loss * torch.inf if batch_idx in self.bad_g else loss)
            infos.append(opt_g.step())
            self.untoggle_optimizer(opt_g)
        self.applied.append(tuple(bool(info.applied) for info in infos))
        self.log("g", loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return AdamW(self.generator.parameters(), lr=0.01), AdamW(self.discriminator.parameters(), lr=0.02)


def data(count: int, rows: int = 4, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, 5, generator=draw).to(dtype), torch.randn(rows, 3, generator=draw).to(dtype))
            for _ in range(count)]  # fmt: skip


def by_hand(batches: list[Any], precision: str, bad_d: tuple[int, ...], bad_g: tuple[int, ...]) -> Any:
    """The same GAN in a loop of pytrain.open_step: its parameters and the scale before each batch."""
    generator, discriminator = nets()
    opt_g, opt_d = AdamW(generator.parameters(), lr=0.01), AdamW(discriminator.parameters(), lr=0.02)
    scaler = LossScaler(enabled=precision != "32")
    scales = []
    for i, (real, noise) in enumerate(batches):
        scales.append(scaler.get_scale())
        half = precision != "32"
        with pytrain.open_step([opt_d, opt_g], scaler) as window:
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = losses(discriminator, real, generator(noise))
            discriminator.zero_grad()
            scaler.scale(loss * torch.inf if i in bad_d else loss).backward()
            window.step(opt_d, max_norm=0.5)
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = small(-discriminator(generator(noise)))
            generator.zero_grad()
            scaler.scale(loss * torch.inf if i in bad_g else loss).backward()
            window.step(opt_g)
    return [*generator.state_dict().values(), *discriminator.state_dict().values()], scales


@pytest.mark.parametrize("toggles", [True, False])
@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
def test_a_gan_has_the_bits_of_the_loop_by_hand_and_one_scale_update_a_batch(
    precision: Any, toggles: bool, tmp_path: Path
) -> None:
    """Without toggles autocast keeps fp16 copies of D's weights, which are old once D has stepped."""
    bad_d, bad_g = ((), ()) if precision == "32" else ((1,), (3,))
    module = Gan(bad_d=bad_d, bad_g=bad_g, toggles=toggles)
    trainer = make_trainer(tmp_path, max_epochs=1, precision=precision)
    trainer.fit(module, data(6))
    params, scales = by_hand(data(6), precision, bad_d, bad_g)
    assert_same_bits(list(module.state_dict().values()), params)
    assert module.scales == scales and module.needs == {(not toggles, True)}
    assert all(p.requires_grad for p in module.parameters())


def test_an_overflow_skips_that_optimizer_alone_and_the_batch_counts_where_another_stepped(tmp_path: Path) -> None:
    module = Gan(bad_d=(1, 4), bad_g=(2, 4), no_g=(5,))
    trainer = make_trainer(tmp_path, max_epochs=1, precision="fp16-mixed")
    trainer.fit(module, data(6))
    expected = [(True, True), (False, True), (True, False), (True, True), (False, False), (True,)]
    assert module.applied == expected
    assert module.scales == [2.0**16, 2.0**16, 2.0**15, 2.0**14, 2.0**14, 2.0**13]
    assert (trainer.global_step, trainer.skipped_steps) == (5, 1)


def test_an_optimizer_that_steps_twice_in_a_batch_takes_two_steps(tmp_path: Path) -> None:
    module = Gan(twice=(0, 2), bad_d=(2,))
    trainer = make_trainer(tmp_path, max_epochs=1, precision="fp16-mixed")
    trainer.fit(module, data(4))
    assert module.applied == [(True,) * 3, (True, True), (False, True, True), (True, True)]
    assert (trainer.global_step, trainer.skipped_steps) == (4, 0)
    _, opt_d = trainer.optimizers
    assert {int(state["step"]) for state in opt_d.state.values()} == {5}


def test_an_earlier_skip_of_one_optimizer_is_none_of_a_later_batch(tmp_path: Path) -> None:
    """G is the first optimizer; it was skipped last in batch 1, and does not step from then on."""
    trainer = make_trainer(tmp_path, max_epochs=1, precision="fp16-mixed")
    trainer.fit(Gan(bad_g=(1,), no_g=(2, 3)), data(4))
    assert (trainer.global_step, trainer.skipped_steps) == (4, 0)


class One(Module):
    """One optimizer by hand, which steps in every second batch."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization, self.every = False, every
        self.w = nn.Parameter(torch.zeros(()))
        self.infos: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.w * batch.mean()
        self.manual_backward(loss / self.every)
        if (batch_idx + 1) % self.every == 0:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def on_train_step_end(self, info: Any) -> None:
        self.infos.append(bool(info.applied))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
def test_batches_without_a_step_count_none_and_have_no_step_hook(precision: Any, tmp_path: Path) -> None:
    module, trainer = One(every=2), make_trainer(tmp_path, max_epochs=1, precision=precision)
    trainer.fit(module, [torch.full((1,), value) for value in (1.0, 2.0, 3.0, 4.0, 8.0)])
    assert (module.w.item(), trainer.global_step, module.infos) == (-5.0, 2, [True, True])


@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
def test_an_error_inside_leaves_all_parameters_free_and_the_next_fit_works(precision: Any, tmp_path: Path) -> None:
    class Fails(Gan):
        def log(self, *args: Any, **kwargs: Any) -> None:
            if not self.failed:
                self.failed = True
                self.toggle_optimizer(self.optimizers()[0])
                raise ValueError("inside")

    module = Fails()
    module.failed = False
    with pytest.raises(ValueError, match="inside"):
        make_trainer(tmp_path, max_epochs=1, precision=precision).fit(module, data(2))
    assert all(p.requires_grad for p in module.parameters())
    with pytest.raises(RuntimeError, match="optimizers: only in training_step"):
        module.optimizers()
    trainer = make_trainer(tmp_path, max_epochs=1, precision=precision)
    trainer.fit(module, data(2))
    assert trainer.global_step == 2


def test_toggling_another_gives_the_first_back(tmp_path: Path) -> None:
    class Toggles(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            opt_g, opt_d = self.optimizers()  # type: ignore[misc]
            self.discriminator[0].bias.requires_grad_(False)  # frozen by the user, and stays so
            self.toggle_optimizer(opt_d)
            self.toggle_optimizer(opt_g)
            grads = [[p.requires_grad for p in net.parameters()] for net in (self.generator, self.discriminator)]
            assert grads == [[True] * 4, [False] * 4]
            self.untoggle_optimizer(opt_g)
            assert [p.requires_grad for p in self.discriminator.parameters()] == [True, False, True, True]

    make_trainer(tmp_path, max_epochs=1).fit(Toggles(), data(1))


@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
def test_a_gan_goes_on_bit_for_bit(precision: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_epochs": 2, "precision": precision, "ema_decay": 0.5, "enable_checkpointing": True,
        "checkpoint_every_n_steps": 1, "keep_checkpoints": None, "seed": 1,
    }  # fmt: skip
    bad = {"bad_d": (1,), "bad_g": (2,)} if precision != "32" else {}
    make_trainer(tmp_path / "whole", **settings).fit(Gan(**bad), data(4))
    whole = load_checkpoint(tmp_path / "whole" / "checkpoints" / "step-00000008.ckpt")
    for step in (2, 5):
        path, folder = tmp_path / "whole" / "checkpoints" / f"step-{step:08d}.ckpt", tmp_path / str(step)
        make_trainer(folder, **settings).fit(Gan(**bad), data(4), ckpt_path=path)
        again = load_checkpoint(folder / "checkpoints" / "step-00000008.ckpt")
        del again["metrics_lines"]
        assert_same_bits(again, {key: value for key, value in whole.items() if key != "metrics_lines"})


def test_averages_move_once_a_batch_and_not_in_one_that_was_skipped(tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []

    class Watch(pytrain.Callback):
        def on_train_step_end(self, trainer: Any, module: Any, info: Any) -> None:
            if info.applied:
                seen.append([p.detach().clone() for p in module.parameters()])

    trainer = make_trainer(tmp_path, max_epochs=1, precision="fp16-mixed", ema_decay=0.5, callbacks=Watch())
    trainer.fit(Gan(bad_d=(1,), bad_g=(1,)), data(4))
    other = Gan()
    average = EMA(other, 0.5)
    for values in seen:
        for p, value in zip(other.parameters(), values, strict=True):
            p.data.copy_(value)
        average.update()
    assert len(seen) == 3 and trainer.ema is not None and trainer.ema.n_averaged == 3
    assert_same_bits(list(trainer.ema.averages.values()), list(average.averages.values()))


@pytest.mark.parametrize("setting", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_what_only_automatic_optimization_follows_is_refused(setting: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}.*of automatic optimization.*step\\(max_norm"):
        make_trainer(tmp_path, max_epochs=1, **setting).fit(One(), [torch.ones(1)])


@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
def test_the_hook_before_a_step_sees_each_optimizers_unscaled_gradients(precision: Any, tmp_path: Path) -> None:
    seen = []

    class Looks(One):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            assert self.w.grad is not None
            seen.append(self.w.grad.item())
            self.w.grad.mul_(2)

    module = Looks()
    make_trainer(tmp_path, max_epochs=1, precision=precision).fit(module, [torch.full((1,), 3.0)] * 2)
    assert seen == [3.0, 3.0] and module.w.item() == -12.0


def test_what_was_logged_is_written_and_no_step_loops_over_max_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(Gan(), data(2))
    assert [row["step"] for row in read_metrics(tmp_path) if "g" in row] == [1, 2, 3]
    assert (trainer.current_epoch, trainer.batch_idx) == (1, 1)


def test_a_step_that_returns_no_loss_has_none_among_its_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tmp_path, max_epochs=1, enable_progress_bar=True).fit(Gan(), data(2))
    rows = read_metrics(tmp_path)
    assert len(rows) == 2 and all("loss" not in row and row["lr"] > 0 for row in rows)
    assert "step 2/2" in (printed := capsys.readouterr().out) and "loss" not in printed


def ranks_gan(group: Any, folder: Path, batches: int) -> Any:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    module = Gan(dtype=torch.float64, seed=rank)
    trainer = make_trainer(folder, max_epochs=1, strategy="single" if group is None else "ddp")
    trainer.fit(module, [(x[rank::size], z[rank::size]) for x, z in data(batches, 8, torch.float64)])
    return [p.detach().clone() for p in module.parameters()], trainer.global_step


def ranks_fp16(group: Any, folder: Path) -> str:
    try:
        make_trainer(folder, max_epochs=1, strategy="ddp", precision="fp16-mixed").fit(Gan(), data(1))
    except NotImplementedError as error:
        return str(error)
    return "no error"


def test_a_gan_on_two_ranks_is_that_of_one_on_the_joined_batches(two: Any, tmp_path: Path) -> None:
    params, steps = ranks_gan(None, tmp_path / "one", 4)
    for theirs, their_steps in two.run(2, ranks_gan, tmp_path / "two", 4):
        assert steps == their_steps == 4
        for a, b in zip(theirs, params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for message in two.run(2, ranks_fp16, tmp_path / "fp16"):
        assert "each rank would move its own loss scale" in message
