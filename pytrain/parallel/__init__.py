"""Training on several ranks over torch.distributed: who reduces what, and what all agree on before a step."""

from pytrain.parallel.ddp import DDP
from pytrain.parallel.ranks import Ranks

__all__ = ["DDP", "Ranks"]
