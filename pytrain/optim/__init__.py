"""Drop-in replacements for torch.optim's optimizers, and optimizers that torch does not have."""

from pytrain.optim.adam import Adam
from pytrain.optim.adamw import AdamW
from pytrain.optim.base import REGISTRY, FusedOptimizer
from pytrain.optim.lion import Lion
from pytrain.optim.sgd import SGD

__all__ = ["REGISTRY", "SGD", "Adam", "AdamW", "FusedOptimizer", "Lion"]
