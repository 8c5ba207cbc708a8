"""WandbLogger and MLFlowLogger: metrics to the services of these names, where their packages are installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytrain.loggers.base import Logger, Status, plain, require, write_text

MLFLOW_STATUSES = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class _RemoteLogger(Logger):
    """Keeps the service's id of the run in a file, so that a resumed run goes on with it."""

    file = ""

    def __init__(self, save_dir: str | os.PathLike[str], version: str | None) -> None:
        self.save_dir: Path = Path(save_dir)
        self._version = version
        self._resumes = False
        self._run: Any = None

    @property
    def version(self) -> str | None:
        """The service's id of the run."""
        return self._version

    @property
    def experiment(self) -> Any:
        """The service's own object for this run; starts it."""
        if self._run is None:
            path = self.save_dir / self.file
            if self._version is None and self._resumes and path.exists():
                self._version = path.read_text(encoding="utf-8").strip()
            self._run = self._start(self._version)
            write_text(path, f"{self._version}\n")
        return self._run

    def _start(self, version: str | None) -> Any:
        """Start a run, or go on with the one of this id; sets `_version`."""
        raise NotImplementedError

    def resume(self, step: int) -> None:
        self._resumes = True


class WandbLogger(_RemoteLogger):
    """Logs to Weights & Biases.

    A resumed run goes on with the same id. Weights & Biases takes no step twice: for steps that were logged before the
    interruption it keeps what it has, which a run that resumes bit for bit would give again.

    Args:
        project: of the run; None: W&B's default.
        name: shown for the run; None: W&B makes one.
        save_dir: where W&B and this logger keep their files.
        version: the id of the run; None: a new one, or in a resumed run the one noted in `save_dir`.
        offline: write to `save_dir` only, to be sent later by `wandb sync`.
        settings: further arguments of `wandb.init`.

    Raises:
        ImportError: the package wandb is not installed.
    """

    file = "wandb_run_id"

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        save_dir: str | os.PathLike[str] = ".",
        version: str | None = None,
        *,
        offline: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(save_dir, version)
        self._wandb = require("wandb", "WandbLogger", "wandb")
        self._project, self._shown, self._offline = project, name, offline
        self._settings = dict(settings or {})

    @property
    def name(self) -> str:
        return self._project or "uncategorized"

    def _start(self, version: str | None) -> Any:
        self.save_dir.mkdir(parents=True, exist_ok=True)
        run = self._wandb.init(
            project=self._project,
            name=self._shown,
            dir=str(self.save_dir),
            id=version,
            resume="allow",
            mode="offline" if self._offline else None,
            **self._settings,
        )
        self._version = run.id
        return run

    def log_metrics(self, metrics: Mapping[str, float], step: int, epoch: int | None = None) -> None:
        self.experiment.log(dict(metrics) if epoch is None else {**metrics, "epoch": epoch}, step=step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self.experiment.config.update(plain(params), allow_val_change=True)

    def finalize(self, status: Status) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run = None


class MLFlowLogger(_RemoteLogger):
    """Logs to MLflow.

    A resumed run goes on with the same id. MLflow keeps all values of a step: those that were logged after the step
    which the run resumes from stand there twice, and where the run resumes bit for bit they are equal.

    Args:
        experiment_name: made where it does not exist.
        run_name: shown for the run; None: MLflow makes one.
        tracking_uri: of the server; None: MLflow's own setting.
        save_dir: where this logger notes the run's id.
        run_id: the run to go on with; None: a new one, or in a resumed run the one noted in `save_dir`.
        tags: of a new run.

    Raises:
        ImportError: the package mlflow is not installed.
    """

    file = "mlflow_run_id"

    def __init__(
        self,
        experiment_name: str = "pytrain_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        save_dir: str | os.PathLike[str] = ".",
        *,
        run_id: str | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(save_dir, run_id)
        self._tracking = require("mlflow.tracking", "MLFlowLogger", "mlflow")
        self._name, self._run_name, self._uri, self._tags = experiment_name, run_name, tracking_uri, dict(tags or {})

    @property
    def name(self) -> str:
        return self._name

    def _start(self, version: str | None) -> Any:
        client = self._tracking.MlflowClient(tracking_uri=self._uri)
        if version is None:
            known = client.get_experiment_by_name(self._name)
            number = client.create_experiment(self._name) if known is None else known.experiment_id
            run = client.create_run(number, run_name=self._run_name, tags=self._tags)
            self._version = run.info.run_id
        else:
            client.update_run(version, status="RUNNING")
        return client

    def log_metrics(self, metrics: Mapping[str, float], step: int, epoch: int | None = None) -> None:
        client = self.experiment
        for name, value in metrics.items():
            client.log_metric(self._version, name, value, step=step)
        if epoch is not None:
            client.log_metric(self._version, "epoch", epoch, step=step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        client = self.experiment
        for name, value in plain(params).items():
            client.log_param(self._version, name, value)

    def finalize(self, status: Status) -> None:
        if self._run is not None:
            self._run.set_terminated(self._version, status=MLFLOW_STATUSES[status])
            self._run = None
