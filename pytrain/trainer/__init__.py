"""A thin trainer: `Module` says what a step is, `Trainer.fit` runs one visible loop over it."""

from pytrain.trainer.checkpoint import CheckpointError, load_checkpoint
from pytrain.trainer.data import DataModule
from pytrain.trainer.module import Module
from pytrain.trainer.trainer import Trainer

__all__ = ["CheckpointError", "DataModule", "Module", "Trainer", "load_checkpoint"]
