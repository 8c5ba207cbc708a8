"""ModelCheckpoint: which files there are at each moment, and that interruptions, nans and full disks cost none."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from callback_cases import Net, SmallTrainer, names

from pytrain.callbacks import ModelCheckpoint
from pytrain.sealed import read_checkpoint, write_checkpoint


def run(folder: Path, checkpoint: ModelCheckpoint, *, ckpt_path: Any = None, **settings: Any) -> SmallTrainer:
    trainer = SmallTrainer(folder, [checkpoint], **settings)
    trainer.fit(Net(), ckpt_path)
    return trainer


def test_every_epoch_is_saved_and_the_newest_stays(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint()
    trainer = run(tmp_path, checkpoint)
    assert trainer.saved == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]
    assert names(tmp_path / "checkpoints") == ["epoch=2-step=12.ckpt"]
    newest = str(tmp_path / "checkpoints" / "epoch=2-step=12.ckpt")
    assert checkpoint.best_model_path == checkpoint.last_model_path == newest
    assert checkpoint.best_model_score is None


@pytest.mark.parametrize(
    ("mode", "scores", "kept", "best", "worst"),
    [
        ("min", [3.0, 1.0, 2.0, 4.0], {1: 1.0, 2: 2.0}, 1, 2),
        ("max", [3.0, 1.0, 2.0, 4.0], {0: 3.0, 3: 4.0}, 3, 0),
        ("min", [2.0, 2.0, 2.0, 2.0], {0: 2.0, 1: 2.0}, 0, 1),  # of equals the older stay
        ("min", [math.nan, 5.0, math.nan, 4.0], {1: 5.0, 3: 4.0}, 3, 1),
        ("max", [math.nan, math.nan, -math.inf, 4.0], {3: 4.0}, 3, None),
    ],
)
def test_the_best_k_stay(
    tmp_path: Path, mode: Any, scores: list[float], kept: dict[int, float], best: int, worst: int | None
) -> None:
    checkpoint = ModelCheckpoint(monitor="val_loss", mode=mode, save_top_k=2, filename="{epoch}")
    run(tmp_path, checkpoint, epochs=4, scores=scores)
    folder = tmp_path / "checkpoints"
    found = {int(name[6]) for name in names(folder)}
    assert len(found) == 2 and set(kept) <= found
    path = {epoch: str(folder / f"epoch={epoch}.ckpt") for epoch in range(4)}
    for epoch, score in kept.items():
        assert checkpoint.best_k_models[path[epoch]] == score
    assert checkpoint.best_model_path == path[best] and checkpoint.best_model_score == scores[best]
    if worst is not None:
        assert checkpoint.kth_best_model_path == path[worst]


def test_a_finite_score_takes_the_place_of_a_nan(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(monitor="val_loss", filename="{epoch}")
    trainer = run(tmp_path, checkpoint, scores=[math.nan, math.nan, 9.0])
    assert trainer.saved == ["epoch=0.ckpt", "epoch=2.ckpt"]
    assert names(tmp_path / "checkpoints") == ["epoch=2.ckpt"] and checkpoint.best_model_score == 9.0


@pytest.mark.parametrize(("k", "count"), [(-1, 3), (0, 0), (2, 2)])
def test_save_top_k_without_a_monitor_keeps_the_newest(tmp_path: Path, k: int, count: int) -> None:
    run(tmp_path, ModelCheckpoint(save_top_k=k, filename="{epoch}"))
    assert names(tmp_path / "checkpoints") == [f"epoch={epoch}.ckpt" for epoch in range(3)][3 - count :]


def test_steps_are_the_applied_ones_and_a_skipped_step_saves_nothing_twice(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer = run(tmp_path, checkpoint, skipped=[4, 5])
    assert trainer.global_step == 10
    assert trainer.saved == ["step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]


def test_every_n_epochs_counts_epochs(tmp_path: Path) -> None:
    trainer = run(tmp_path, ModelCheckpoint(every_n_epochs=2, filename="{epoch}"), epochs=5)
    assert trainer.saved == ["epoch=1.ckpt", "epoch=3.ckpt"]


def test_the_name_is_made_of_metrics(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(monitor="val_loss", filename="a-{epoch:02d}-{val_loss:.2f}-{loss:.0f}")
    trainer = run(tmp_path, checkpoint, epochs=1, scores=[0.12345])
    assert trainer.saved == [f"a-epoch=00-val_loss=0.12-loss={trainer.callback_metrics['loss']:.0f}.ckpt"]


@pytest.mark.parametrize("save_on_train_epoch_end", [None, True, False])
def test_a_monitor_that_is_missing_is_an_error_that_lists_the_metrics(
    tmp_path: Path, save_on_train_epoch_end: bool | None
) -> None:
    checkpoint = ModelCheckpoint(monitor="val_los", save_on_train_epoch_end=save_on_train_epoch_end)
    with pytest.raises(ValueError, match=r"ModelCheckpoint: 'val_los' is not among the metrics \['loss', 'val_loss'\]"):
        run(tmp_path, checkpoint, scores=[1.0, 1.0, 1.0])
    assert names(tmp_path) == []


def test_a_metric_in_the_name_that_is_missing_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(filename="{epoch}-{acc:.2f}")
    with pytest.raises(ValueError, match=r"'acc' is not among the metrics \['loss'\]"):
        run(tmp_path, checkpoint)
    assert checkpoint.best_k_models == {}


def test_a_metric_of_a_validation_that_is_still_to_come_is_waited_for(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(monitor="val_loss", every_n_train_steps=3, filename="{step}")
    trainer = run(tmp_path, checkpoint, epochs=2, scores=[2.0, 1.0])
    assert trainer.saved == ["step=6.ckpt"]  # 3 comes before the first validation


@pytest.mark.parametrize("save_last", [True, "link"])
def test_last_leads_to_the_newest_state_and_outlives_the_file_that_it_led_to(tmp_path: Path, save_last: Any) -> None:
    checkpoint = ModelCheckpoint(monitor="val_loss", save_last=save_last, filename="{epoch}")
    folder = tmp_path / "checkpoints"
    states = []

    class Watch(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            last = folder / "last.ckpt"
            states.append((read_checkpoint(last)["epoch"], last.is_symlink(), names(folder)))

    trainer = SmallTrainer(tmp_path, [checkpoint, Watch(save_top_k=0)], epochs=4, scores=[2.0, 3.0, 1.0, 1.5])
    trainer.fit(Net())
    assert [epoch for epoch, _, _ in states] == [0, 1, 2, 3]
    assert [link for _, link, _ in states] == ([True, False, True, False] if save_last == "link" else [False] * 4)
    assert [kept for _, _, kept in states] == [[f"epoch={best}.ckpt", "last.ckpt"] for best in (0, 0, 2, 2)]
    assert checkpoint.last_model_path == str(folder / "last.ckpt")
    assert not list(folder.glob(".*"))  # nothing half done
    assert checkpoint.best_model_path == str(folder / "epoch=2.ckpt")


def test_last_stays_a_second_name_of_the_newest_file(tmp_path: Path) -> None:
    run(tmp_path, ModelCheckpoint(save_last=True))
    folder = tmp_path / "checkpoints"
    assert (folder / "last.ckpt").samefile(folder / "epoch=2-step=12.ckpt")
    assert sorted(path.name for path in folder.iterdir()) == ["epoch=2-step=12.ckpt", "last.ckpt"]


def test_last_is_copied_where_the_disk_has_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path, ModelCheckpoint(save_last=True))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["epoch"] == 2 and last.stat().st_nlink == 1


def test_an_older_file_goes_only_when_the_new_one_is_there(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(filename="{epoch}")
    seen = []

    class Watched(SmallTrainer):
        def save_checkpoint(self, path: Any) -> None:
            seen.append(names(Path(path).parent))
            super().save_checkpoint(path)

    trainer = Watched(tmp_path, [checkpoint])
    trainer.fit(Net())
    assert seen == [[], ["epoch=0.ckpt"], ["epoch=1.ckpt"]]


def test_a_file_that_is_written_in_the_background_is_waited_for(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(filename="{epoch}", save_last=True)

    seen, waiting = [], []

    class Later(SmallTrainer):
        def save_checkpoint(self, path: Any) -> None:
            seen.append(names(Path(path).parent))
            waiting.append((path, self.state()))

        def call(self, hook: str, *arguments: Any) -> None:
            if hook in ("on_train_epoch_start", "on_fit_end"):
                while waiting:
                    write_checkpoint(*waiting.pop())
            super().call(hook, *arguments)

    Later(tmp_path, [checkpoint]).fit(Net())
    assert seen == [[], ["epoch=0.ckpt", "last.ckpt"], ["epoch=1.ckpt", "last.ckpt"]]
    assert names(tmp_path / "checkpoints") == ["epoch=2.ckpt", "last.ckpt"]


def test_a_save_that_fails_loses_no_file_and_no_score(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(monitor="val_loss", filename="{epoch}")

    class Full(SmallTrainer):
        def save_checkpoint(self, path: Any) -> None:
            if self.current_epoch == 1:
                raise OSError("no space left on device")
            super().save_checkpoint(path)

    with pytest.raises(OSError, match="no space left"):
        Full(tmp_path, [checkpoint], scores=[3.0, 2.0, 1.0]).fit(Net())
    assert names(tmp_path / "checkpoints") == ["epoch=0.ckpt"]
    assert checkpoint.best_model_score == 3.0 and checkpoint.best_model_path.endswith("epoch=0.ckpt")


@pytest.mark.parametrize("kill_at", [5, 8, 9, 12, 17])
def test_a_resumed_run_ends_with_the_files_of_the_undisturbed_one(tmp_path: Path, kill_at: int) -> None:
    scores = [5.0, 3.0, 4.0, 2.0, 6.0]

    def make() -> ModelCheckpoint:
        return ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)

    whole = make()
    run(tmp_path / "whole", whole, epochs=5, scores=scores)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", make(), epochs=5, scores=scores, kill_at=kill_at)
    resumed = make()
    folder = tmp_path / "cut" / "checkpoints"
    run(tmp_path / "cut", resumed, epochs=5, scores=scores, ckpt_path=folder / "last.ckpt")
    assert names(folder) == names(tmp_path / "whole" / "checkpoints")
    assert list(resumed.best_k_models.values()) == list(whole.best_k_models.values())
    assert resumed.state_dict() == whole.state_dict()


def test_what_a_kill_has_left_is_removed_by_the_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the new file was written and before the older one was removed."""
    folder = tmp_path / "checkpoints"
    real = Path.unlink

    def die(self: Path, missing_ok: bool = False) -> None:
        if self.name == "epoch=0.ckpt":
            raise KeyboardInterrupt
        real(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", die)
        run(tmp_path, ModelCheckpoint(filename="{epoch}"))
    assert names(folder) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    run(tmp_path, ModelCheckpoint(filename="{epoch}"), ckpt_path=folder / "epoch=1.ckpt")
    assert names(folder) == ["epoch=2.ckpt"]


def test_a_new_run_leaves_the_files_of_another_alone_and_a_resumed_one_writes_over_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first = ModelCheckpoint(save_top_k=-1, filename="{epoch}")
    run(tmp_path, first, epochs=2)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    second = ModelCheckpoint(save_top_k=-1, filename="{epoch}")
    run(tmp_path, second, epochs=2)
    assert names(folder) == ["epoch=0-v1.ckpt", "epoch=0.ckpt", "epoch=1-v1.ckpt", "epoch=1.ckpt"]
    assert {name: (folder / name).read_bytes() for name in before} == before
    again = ModelCheckpoint(save_top_k=-1, filename="{epoch}")
    trainer = run(tmp_path, again, epochs=2, ckpt_path=folder / "epoch=0.ckpt")
    assert trainer.saved == ["epoch=1.ckpt"] and len(names(folder)) == 4


def test_a_resumed_run_in_another_folder_leaves_the_files_there(tmp_path: Path) -> None:
    run(tmp_path / "a", ModelCheckpoint(tmp_path / "here", filename="{epoch}"), epochs=1)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "epoch=0.ckpt").write_text("another run's")
    moved = ModelCheckpoint(tmp_path / "there", filename="{epoch}")
    run(tmp_path / "a", moved, epochs=2, ckpt_path=tmp_path / "here" / "epoch=0.ckpt")
    assert names(tmp_path / "here") == ["epoch=0.ckpt"] and names(tmp_path / "there") == [
        "epoch=0.ckpt",
        "epoch=1.ckpt",
    ]
    assert list(moved.best_k_models) == [str(tmp_path / "there" / "epoch=1.ckpt")]


def test_a_run_folder_that_was_moved_goes_on(tmp_path: Path) -> None:
    run(tmp_path / "a", ModelCheckpoint(filename="{epoch}"), epochs=1)
    (tmp_path / "a").rename(tmp_path / "b")
    run(
        tmp_path / "b", ModelCheckpoint(filename="{epoch}"), epochs=2, ckpt_path=tmp_path / "b/checkpoints/epoch=0.ckpt"
    )
    assert names(tmp_path / "b" / "checkpoints") == ["epoch=1.ckpt"]


def test_one_name_for_all_is_replaced_in_place(tmp_path: Path) -> None:
    trainer = run(tmp_path, ModelCheckpoint(monitor="val_loss", filename="best"), scores=[3.0, 4.0, 2.0])
    assert trainer.saved == ["best.ckpt", "best.ckpt"] and names(tmp_path / "checkpoints") == ["best.ckpt"]
    assert read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["epoch"] == 2


def test_other_ranks_save_at_the_same_moments_and_remove_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 4, "scores": [3.0, 4.0, 1.0, 2.0]}
    ours = ModelCheckpoint(monitor="val_loss", filename="{epoch}", save_last="link")
    other = ModelCheckpoint(monitor="val_loss", filename="{epoch}", save_last="link")
    first = run(tmp_path / "0", ours, **settings)
    second = run(tmp_path / "1", other, rank=1, **settings)
    assert first.saved == second.saved and not (tmp_path / "1").exists()
    assert ours.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"save_top_k": -2}, "save_top_k must be an int >= -1, got -2"),
        ({"every_n_train_steps": 0}, "every_n_train_steps must be an int >= 1, got 0"),
        ({"every_n_epochs": 1.5}, "every_n_epochs must be an int >= 1, got 1.5"),
        ({"every_n_epochs": 1, "every_n_train_steps": 5}, "are both given"),
        ({"save_last": "copy"}, "save_last must be True, False or 'link', got 'copy'"),
        ({"filename": "a/{epoch}"}, "filename must be one name without folders, got 'a/{epoch}'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ModelCheckpoint: .*{message}"):
        ModelCheckpoint(**arguments)
