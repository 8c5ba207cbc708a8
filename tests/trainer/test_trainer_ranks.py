"""The trainer on two ranks over Gloo: as one process on the joined batches, with checkpoints that go both ways."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

if sys.platform != "linux" or not dist.is_available():
    pytest.skip("the ranks' processes are tested on Linux", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
import rank_cases as cases
from pool import Pool
from trainer_cases import assert_same_bits, make_trainer

from pytrain import parallel
from pytrain.optim import AdamW
from pytrain.trainer import Trainer, load_checkpoint

STRATEGIES = ("ddp", "zero1", "zero2")


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def assert_rows_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [list(row) for row in found] == [list(row) for row in expected]
    for ours, other in zip(found, expected, strict=True):
        assert ours == pytest.approx(other, rel=1e-12)


FULL = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "ema_decay": 0.8}


@pytest.mark.parametrize("strategy", [*STRATEGIES, parallel.Zero1], ids=str)
def test_ranks_fit_as_one_process_on_the_joined_batches(two: Pool, strategy: Any, tmp_path: Path) -> None:
    """Windows of 2, 2 and 1 batches; a clip that bites; a schedule, averages, metrics, validation."""
    params, averages, rows, counts = cases.run(None, tmp_path / "one", "single", 5, FULL)
    assert counts == (6, 0, 2) and max(row.get("grad_norm", 0) for row in rows) > 0.05
    found = two.run(2, cases.run, tmp_path / "two", strategy, 5, FULL)
    for their_params, their_averages, their_rows, their_counts in found:
        assert_close(their_params, params)
        assert_close(their_averages, averages)
        assert_rows_close(their_rows, rows)
        assert their_counts == counts
    assert_same_bits(found[0][0], found[1][0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_by_name_works_in_one_process_and_leaves_no_group(strategy: Any, tmp_path: Path) -> None:
    params, *_ = cases.run(None, tmp_path / "single", "single", 3, FULL)
    for _ in range(2):  # a second start finds nothing of the first
        found, *_ = cases.run(None, tmp_path / strategy, strategy, 3, FULL)
        assert_close(found, params)
        assert not dist.is_initialized()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_inf_on_one_rank_is_a_skip_on_all(two: Pool, strategy: str, tmp_path: Path) -> None:
    found = two.run(2, cases.overflow, tmp_path, strategy)
    assert_same_bits(found[0], found[1])
    assert found[0][1:] == (3, 1, 2.0**15, 0.01 * 0.9)


SAVING: dict[str, Any] = {
    "max_epochs": 2,
    "enable_checkpointing": True,
    "checkpoint_every_n_steps": 1,
    "keep_checkpoints": None,
}


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}.ckpt"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_two_ranks_goes_on_bit_for_bit_on_two(two: Pool, strategy: str, tmp_path: Path) -> None:
    """Shuffling, noise in the data, dropout; 3 batches an epoch: inside the first, at its end, inside the second."""
    settings, whole = {**SAVING, "seed": 1}, tmp_path / "whole"
    expected = two.run(2, cases.run_noisy, whole, strategy, settings, None)
    assert not torch.equal(expected[0][1][0], expected[1][1][0])
    for step in (1, 3, 5):
        folder = tmp_path / str(step)
        found = two.run(2, cases.run_noisy, folder, strategy, {**settings, "seed": 1}, checkpoint(whole, step))
        for (params, seen, rows, _), (whole_params, whole_seen, whole_rows, _) in zip(found, expected, strict=True):
            assert_same_bits(params, whole_params)
            assert_same_bits(seen, whole_seen[step:])
            assert rows == whole_rows[-len(rows) :]
        final, theirs = (load_checkpoint(checkpoint(one, 6)) for one in (folder, whole))
        assert final.pop("metrics_lines") < theirs.pop("metrics_lines")
        assert_same_bits(final, theirs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_goes_on_on_another_number_of_ranks(two: Pool, strategy: str, tmp_path: Path) -> None:
    settings = {**SAVING, **FULL, "accumulate_grad_batches": 1}
    params, averages, *_ = cases.run(None, tmp_path / "one", "single", 3, settings)
    two.run(2, cases.run, tmp_path / "two", strategy, 3, settings)
    for step in (2, 3):
        ours = cases.run(None, tmp_path / "down", "single", 3, settings, checkpoint(tmp_path / "two", step))
        up = two.run(2, cases.run, tmp_path / "up", strategy, 3, settings, checkpoint(tmp_path / "one", step))
        for found in (ours, *up):
            assert_close(found[0], params)
            assert_close(found[1], averages)
            assert found[3] == (6, 0, 2)


def test_what_ranks_cannot_keep_of_a_checkpoint_of_other_ranks_is_said(two: Pool, tmp_path: Path) -> None:
    settings = {**SAVING, "seed": 1}
    cases.run_noisy(None, tmp_path / "one", "single", settings, None)
    found = two.run(2, cases.run_noisy, tmp_path / "two", "ddp", settings, checkpoint(tmp_path / "one", 1))
    said = "the checkpoint was taken on 1 ranks, this run has 2; the random states of ranks 1 to 1 are seeded anew"
    assert said in found[0][3] and found[1][3] == ""
    *_, said = cases.run_noisy(None, tmp_path / "back", "single", settings, checkpoint(tmp_path / "two", 5))
    assert "the checkpoint was taken on 2 ranks, this run has 1\n" in said


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saving_after_fit_writes_all_ranks_state_once(two: Pool, strategy: str, tmp_path: Path) -> None:
    first, second = two.run(2, cases.saved_after, tmp_path, strategy)
    saved = load_checkpoint(tmp_path / "after.ckpt")
    assert first == second == saved["module"]["seen"].item() != 0.0
    assert len(saved["rng"]) == len(saved["epoch_rng"]) == 2 and saved["global_step"] == 3
    assert [tuple(state["exp_avg"].shape) for state in saved["optimizers"][0]["state"].values()] == [
        (16, 5), (16,), (3, 16), (3,),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "count"), [("plain", 8), ("shuffled", 9), ("generator", 8)])
def test_a_sampler_is_put_in_where_there_is_none(two: Pool, kind: str, count: int, tmp_path: Path) -> None:
    found = two.run(2, cases.rows_of, tmp_path, kind, count, 0)
    said = (
        "pytrain: train_dataloaders: a DistributedSampler shares its rows out to 2 ranks; batch_size is each rank's\n"
    )
    assert [text for _, text, _ in found] == [said, ""]
    epochs = []
    for epoch in (0, 1):
        parts = [rows[2 * epoch : 2 * epoch + 2] for rows, *_ in found]
        assert all(len(rows) == 2 and all(len(row) == 2 for row in rows) for rows in parts)
        seen = [row for rows in parts for batch in rows for row in batch]
        assert len(set(seen)) == 8 and set(seen) <= set(range(count))
        epochs.append(parts)
    assert (epochs[0] == epochs[1]) == (kind == "plain")


def test_the_seed_decides_the_order_that_ranks_share(two: Pool, tmp_path: Path) -> None:
    orders = [two.run(2, cases.rows_of, tmp_path, "shuffled", 16, 0, seed)[0][0] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("list", "it is a list"),
        ("own sampler", "it has a sampler, range"),
        ("batch_sampler", "it has a batch_sampler, BatchSampler"),
        ("replacement", "its RandomSampler draws with replacement, or not all rows once"),
        ("stream", "its dataset is an IterableDataset"),
    ],
)
def test_what_has_its_own_order_is_left_alone_and_that_is_said(
    two: Pool, kind: str, reason: str, tmp_path: Path
) -> None:
    found = two.run(2, cases.rows_of, tmp_path, kind, 4, 0)
    said = f"pytrain: train_dataloaders is left as it is ({reason}): what it gives on a rank is that rank's part\n"
    assert [text for _, text, _ in found] == [said, ""]
    assert [len(rows) for rows, *_ in found] == [4, 4]
    if kind != "replacement":
        assert all(rows == [[0.0, 1.0], [2.0, 3.0]] * 2 for rows, *_ in found)


@pytest.mark.parametrize("count", [1, 7, 8])
def test_validation_metrics_are_those_of_all_rows_each_once(two: Pool, count: int, tmp_path: Path) -> None:
    """Of one row, rank 1 has none."""
    found = two.run(2, cases.rows_of, tmp_path, "plain", 4, count)
    validated = [row for row in found[0][2] if "val_loss" in row]
    assert len(validated) == 2
    assert all(row["sum"] == row["val_loss"] == sum(range(count)) / count for row in validated)


def test_ranks_with_different_numbers_of_batches_are_named(two: Pool, tmp_path: Path) -> None:
    found = two.run(2, cases.counts, tmp_path, [3, 4], 1, True)
    assert found[0] == found[1]
    assert "the number of batches an epoch differs between ranks" in found[0]
    assert "3 batches on rank 0, 4 batches on rank 1" in found[0]


@pytest.mark.parametrize(("numbers", "accumulate", "steps"), [([3, 5], 1, 3), ([5, 3], 2, 2), ([4, 4], 3, 2)])
def test_an_epoch_of_unknown_length_ends_where_the_first_rank_has_no_more(
    two: Pool, numbers: list[int], accumulate: int, steps: int, tmp_path: Path
) -> None:
    assert two.run(2, cases.counts, tmp_path, numbers, accumulate, False) == [(steps, 1)] * 2


def test_ranks_with_different_settings_are_named(two: Pool, tmp_path: Path) -> None:
    for message in two.run(2, cases.differing, tmp_path):
        assert "the Trainer's configuration differs between ranks" in message
        assert "max_steps=3 on rank 0, max_steps=4 on rank 1" in message


def test_auto_is_ddp_among_ranks_and_rank_0_alone_writes(two: Pool, tmp_path: Path) -> None:
    first, second = two.run(2, cases.auto, tmp_path)
    assert first == [("DDP", 2, True), ("DDP", 2, True), ("Alone", 1, True)]
    assert second == [("DDP", 2, False), ("DDP", 2, False), ("Alone", 1, True)]


def test_each_rank_draws_its_own_random_numbers(two: Pool, tmp_path: Path) -> None:
    first, second = two.run(2, cases.draws, tmp_path)
    assert first != second and [first, second] == two.run(2, cases.draws, tmp_path)


def test_an_unfit_strategy_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"strategy must be one of \['auto', .* got 'fsdp'"):
        Trainer(max_steps=1, strategy="fsdp")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="strategy must return a pytrain.parallel.Strategy, .* returned NoneType"):
        make_trainer(tmp_path, max_steps=1, strategy=lambda *_: None).fit(cases.Regression(), cases.joined(1))

    class Torchs(cases.Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    class Released(cases.Regression):
        def configure_optimizers(self) -> Any:
            return AdamW(self.parameters(), step_in_backward=True)

    with pytest.raises(TypeError, match="expected one of pytrain.optim, got AdamW; with torch's own use DDP"):
        make_trainer(tmp_path, max_steps=1, strategy="zero1").fit(Torchs(), cases.joined(1))
    with pytest.raises(ValueError, match="Trainer: strategy='ddp' needs all gradients of a step together"):
        make_trainer(tmp_path, max_steps=1, strategy="ddp").fit(Released(), cases.joined(1))
    assert not dist.is_initialized()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_after_an_error_the_module_is_let_go(strategy: Any, tmp_path: Path) -> None:
    class Stops(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1 and stops:
                raise KeyError("stop")
            return super().training_step(batch, batch_idx)

    stops, module = True, Stops()
    with pytest.raises(KeyError, match="stop"):
        make_trainer(tmp_path, max_steps=3, strategy=strategy).fit(module, cases.joined(3))
    assert not dist.is_initialized()
    stops = False
    make_trainer(tmp_path, max_steps=3).fit(module, cases.joined(3))


LAUNCHED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
import rank_cases as cases
from trainer_cases import make_trainer
from pytrain.trainer import load_checkpoint

rank, folder = int(os.environ["RANK"]), Path({folder!r})
for number, strategy in enumerate(("auto", "zero2")):
    module = cases.Regression(seed=rank)
    trainer = make_trainer(folder / str(number), max_epochs=2, strategy=strategy)
    trainer.fit(module, cases.part(cases.joined(3), rank, 2))
    assert trainer.run.team.size == 2 and not dist.is_initialized()
    trainer.save_checkpoint(folder / f"{{strategy}}.ckpt")

class Fails(cases.Regression):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and rank == 1:
            raise KeyError("only here")
        return super().training_step(batch, batch_idx)

try:
    make_trainer(folder, max_epochs=2, strategy="zero1").fit(Fails(), cases.joined(3))
except (KeyError, RuntimeError) as error:
    (folder / f"error{{rank}}").write_text(type(error).__name__)
"""


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import rank_cases as cases
from trainer_cases import make_trainer

rank, folder = int(os.environ["RANK"]), Path({folder!r})

class Dies(cases.Regression):
    def training_step(self, batch, batch_idx):
        if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

options = {{"enable_checkpointing": True, "checkpoint_every_n_steps": 1}}
trainer = make_trainer(folder, max_epochs=3, strategy="zero1", **options)
trainer.fit(Dies(), cases.part(cases.joined(4), rank, 2), ckpt_path="last")
(folder / f"begun{{rank}}").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
trainer.save_checkpoint(folder / "end.ckpt")
"""


def launch(script: Path, *options: str) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options, str(script)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_torchrun_restarts_a_killed_rank_and_the_trainer_goes_on(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    launch(tmp_path / "script.py", "--max-restarts", "2")
    params, *_ = cases.run(None, tmp_path / "one", "single", 4, {"max_epochs": 3})
    module = load_checkpoint(tmp_path / "end.ckpt")["module"]
    assert_close([value for name, value in module.items() if name != "seen"], params)
    assert all(int((tmp_path / f"begun{rank}").read_text()) >= 1 for rank in range(2))


def test_under_torchrun_each_fit_starts_and_ends_its_ranks(tmp_path: Path) -> None:
    """Two fits one after the other, then one that fails on one rank: the other one ends too."""
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    launch(script)
    params, *_ = cases.run(None, tmp_path / "one", "single", 3, {"max_epochs": 2})
    for strategy in ("auto", "zero2"):
        module = load_checkpoint(tmp_path / f"{strategy}.ckpt")["module"]
        assert_close([value for name, value in module.items() if name != "seen"], params)
    assert (tmp_path / "error1").read_text() == "KeyError"
    assert (tmp_path / "error0").read_text() in ("RuntimeError", "DistBackendError", "RankError")
