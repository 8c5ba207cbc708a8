"""What Lightning's Trainer and modules have that pytrain's have not, and what to use instead: the words of errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ARGUMENTS_NOT_OFFERED = {
    "auto_lr_find": "try learning rates in a loop of short runs (max_steps)",
    "auto_scale_batch_size": "try batch sizes in a loop of short runs (max_steps)",
    "barebones": "callbacks, loggers and checkpoints that are off cost nothing",
    "benchmark": "set torch.backends.cudnn.benchmark = True",
    "detect_anomaly": "use torch.autograd.set_detect_anomaly(True)",
    "enable_model_summary": "print(module), or the torchinfo package",
    "gpus": 'use accelerator="cuda", devices=N',
    "inference_mode": "validation runs under torch.no_grad()",
    "max_nb_epochs": "use max_epochs",
    "min_epochs": "let EarlyStopping's patience be longer",
    "min_steps": "let EarlyStopping's patience be longer",
    "num_sanity_val_steps": "use fast_dev_run to try a few batches of all loops",
    "plugins": "pass a strategy of pytrain.parallel as strategy=",
    "profiler": "use callbacks=[pytrain.callbacks.Profiler()]",
    "reload_dataloaders_every_n_epochs": "let the loader's sampler have a set_epoch(epoch)",
    "resume_from_checkpoint": "use fit(ckpt_path=...)",
    "sync_batchnorm": "use torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)",
    "truncated_bptt_steps": "set tbptt_steps on the module",
    "use_distributed_sampler": "a loader with a sampler of its own is left as it is",
    "weights_summary": "print(module), or the torchinfo package",
}
MOMENTS = ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end", "model_eval", "model_train")
HOOKS_NOT_OFFERED = {
    "on_train_start": "on_fit_start",
    "on_train_end": "on_fit_end",
    "on_validation_start": "on_validation_epoch_start",
    "on_validation_end": "on_validation_epoch_end",
    "on_sanity_check_start": "fast_dev_run, which tries a few batches of all loops",
    "on_sanity_check_end": "fast_dev_run, which tries a few batches of all loops",
    "on_validation_model_eval": "on_validation_epoch_start",
    "on_validation_model_train": "on_validation_epoch_end",
    "on_validation_model_zero_grad": "on_validation_epoch_start",
    **{f"on_test_{moment}": "test_step, and what Trainer.test returns" for moment in MOMENTS},
    **{f"on_predict_{moment}": "predict_step, and what Trainer.predict returns" for moment in MOMENTS},
    "teardown": "on_fit_end and on_exception",
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "log in test_step",
    "training_step_end": "training_step",
    "validation_step_end": "validation_step",
    "optimizer_step": "automatic_optimization = False",
    "optimizer_zero_grad": "automatic_optimization = False",
    "lr_scheduler_step": "automatic_optimization = False",
    "on_before_backward": "training_step, which returns the loss that goes backward",
    "backward": "automatic_optimization = False",
    "on_after_backward": "on_before_optimizer_step",
    "on_before_zero_grad": "on_train_batch_start",
    "configure_gradient_clipping": "automatic_optimization = False",
    "configure_callbacks": "Trainer(callbacks=...)",
    "configure_sharded_model": "__init__",
    "configure_model": "__init__",
    "tbptt_split_batch": "tbptt_split",
    "on_before_batch_transfer": "a collate_fn",
    "on_after_batch_transfer": "a collate_fn, or training_step",
    "transfer_batch_to_device": "a collate_fn, or training_step",
}


def refuse_arguments(settings: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments that there are not, with what to do instead where Lightning has them."""
    for name in settings:
        instead = ARGUMENTS_NOT_OFFERED.get(name)
        raise TypeError(
            f"Trainer: there is no argument {name!r}" + ("" if instead is None else f"; instead, {instead}")
        )


def check_hooks(owner: object) -> None:
    """Raise TypeError for a method of a module or callback that would never be called, and not be missed otherwise."""
    for name, instead in HOOKS_NOT_OFFERED.items():
        if callable(getattr(type(owner), name, None)):
            raise TypeError(f"{type(owner).__name__}.{name} would never be called; use {instead}")
