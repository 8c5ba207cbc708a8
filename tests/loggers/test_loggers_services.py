"""TensorBoardLogger against TensorBoard itself, WandbLogger and MLFlowLogger against stand-ins for their packages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pytrain.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 0.5, "lr": 0.25}, 1, 0)
    logger.log_metrics({"loss": 0.75}, 2, 1)
    logger.save()
    wanted = {"loss": [(1, 0.5), (2, 0.75)], "lr": [(1, 0.25)], "epoch": [(1, 0.0), (2, 1.0)]}
    assert points(logger.log_dir) == wanted
    logger.finalize("success")
    logger.finalize("success")
    assert points(logger.log_dir) == wanted and logger.log_dir == tmp_path / "pytrain_logs" / "version_0"


def test_tensorboard_drops_what_came_after_the_step_that_a_run_resumes_from(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first = TensorBoardLogger(tmp_path)
    for step in range(1, 7):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("interrupted")
    resumed = TensorBoardLogger(tmp_path)
    resumed.resume(4)
    resumed.log_metrics({"loss": 50.0}, 5)
    resumed.finalize("success")
    assert resumed.log_dir == first.log_dir
    assert points(first.log_dir) == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]}


def test_tensorboard_shows_a_new_run_alone_where_its_folder_was_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    # Event files of one process and second are told apart by a count, and read by name: ...10 before ...9.
    monkeypatch.setattr(files, "_global_uid", type(files._global_uid)(0))
    for value in (1.0, 2.0):
        logger = TensorBoardLogger(tmp_path, "", "mine")
        logger.log_metrics({"loss": value}, 3)
        logger.finalize("success")
    assert points(tmp_path / "mine") == {"loss": [(3, 2.0)]}


def test_tensorboard_has_the_hyperparameters(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.5, "net": {"width": 8}})
    logger.finalize("success")
    events = accumulator.EventAccumulator(str(logger.log_dir))
    events.Reload()
    text = events.Tensors("hparams/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"lr": 0.5' in text and '"net/width": 8' in text
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda: TensorBoardLogger("logs"), "tensorboard"),
        (lambda: WandbLogger(), "wandb"),
        (lambda: MLFlowLogger(), "mlflow"),
    ],
)
def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    make: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.tracking", None)
    with pytest.raises(ImportError, match=f"Logger needs the package {package} .*: pip install {package}$"):
        make()


class Wandb(ModuleType):
    """Takes what WandbLogger does, as wandb's functions take it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[Any, ...]] = []

    def init(
        self, *, project: Any, name: Any, dir: str, id: str | None, resume: str, mode: Any, tags: Any = None
    ) -> Any:
        self.calls.append(("init", project, name, id, resume, mode, tags))
        assert Path(dir).is_dir()
        return SimpleNamespace(
            id=id or "made-up",
            log=lambda metrics, step: self.calls.append(("log", metrics, step)),
            config=SimpleNamespace(
                update=lambda params, allow_val_change: self.calls.append(("config", params, allow_val_change))
            ),
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_wandb_gets_metrics_hyperparameters_and_the_end(tmp_path: Path, wandb: Wandb) -> None:
    logger = WandbLogger("project", "name", tmp_path / "w", offline=True, settings={"tags": ["a"]})
    assert logger.version is None and wandb.calls == [] and not (tmp_path / "w").exists()
    logger.log_hyperparams({"net": {"width": 8}})
    logger.log_metrics({"loss": 0.5}, 7, 1)
    logger.log_metrics({"loss": 0.25}, 8)
    logger.finalize("failed")
    logger.finalize("failed")
    assert wandb.calls == [
        ("init", "project", "name", None, "allow", "offline", ["a"]),
        ("config", {"net/width": 8}, True),
        ("log", {"loss": 0.5, "epoch": 1}, 7),
        ("log", {"loss": 0.25}, 8),
        ("finish", 1),
    ]
    assert logger.version == "made-up" and logger.name == "project"


def test_wandb_resumes_the_run_that_is_noted_and_starts_anew_without_a_resume(tmp_path: Path, wandb: Wandb) -> None:
    WandbLogger(save_dir=tmp_path, version="first").log_metrics({"loss": 1.0}, 1)
    resumed = WandbLogger(save_dir=tmp_path)
    resumed.resume(1)
    resumed.log_metrics({"loss": 1.0}, 2)
    WandbLogger(save_dir=tmp_path).log_metrics({"loss": 1.0}, 1)
    assert [call[3] for call in wandb.calls if call[0] == "init"] == ["first", "first", None]


class Client:
    """Takes what MLFlowLogger does, as mlflow's client takes it."""

    experiments: dict[str, str] = {}
    calls: list[tuple[Any, ...]] = []

    def __init__(self, tracking_uri: str | None) -> None:
        self.calls.append(("client", tracking_uri))

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = "17"
        return "17"

    def create_run(self, experiment_id: str, *, run_name: Any, tags: Any) -> Any:
        self.calls.append(("create_run", experiment_id, run_name, tags))
        return SimpleNamespace(info=SimpleNamespace(run_id="made-up"))

    def update_run(self, run_id: str, *, status: str) -> None:
        self.calls.append(("update_run", run_id, status))

    def log_metric(self, run_id: str, key: str, value: float, *, step: int) -> None:
        self.calls.append(("metric", run_id, key, value, step))

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        self.calls.append(("param", run_id, key, value))

    def set_terminated(self, run_id: str, *, status: str) -> None:
        self.calls.append(("end", run_id, status))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    package, tracking = ModuleType("mlflow"), ModuleType("mlflow.tracking")
    tracking.MlflowClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)
    monkeypatch.setattr(Client, "experiments", {})
    monkeypatch.setattr(Client, "calls", [])
    return Client


def test_mlflow_gets_metrics_hyperparameters_and_the_end(tmp_path: Path, mlflow: type[Client]) -> None:
    logger = MLFlowLogger("e", "name", "uri", tmp_path, tags={"a": 1})
    logger.log_hyperparams({"lr": 0.5})
    logger.log_metrics({"loss": 0.25}, 7, 1)
    logger.finalize("interrupted")
    assert mlflow.calls == [
        ("client", "uri"),
        ("create_run", "17", "name", {"a": 1}),
        ("param", "made-up", "lr", 0.5),
        ("metric", "made-up", "loss", 0.25, 7),
        ("metric", "made-up", "epoch", 1, 7),
        ("end", "made-up", "KILLED"),
    ]
    assert (logger.name, logger.version) == ("e", "made-up")


def test_mlflow_resumes_the_run_that_is_noted(tmp_path: Path, mlflow: type[Client]) -> None:
    MLFlowLogger("e", save_dir=tmp_path).log_metrics({}, 1)
    resumed = MLFlowLogger("e", save_dir=tmp_path)
    resumed.resume(1)
    resumed.log_metrics({"loss": 1.0}, 2)
    resumed.finalize("success")
    assert mlflow.calls[-3:] == [
        ("update_run", "made-up", "RUNNING"),
        ("metric", "made-up", "loss", 1.0, 2),
        ("end", "made-up", "FINISHED"),
    ]
