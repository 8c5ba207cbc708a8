"""Training on several ranks over torch.distributed: who reduces what, and what all agree on before a step."""

from pytrain.heartbeat import RankError
from pytrain.parallel.base import Strategy
from pytrain.parallel.ddp import DDP
from pytrain.parallel.ranks import Ranks
from pytrain.parallel.zero import Zero1, Zero2

__all__ = ["DDP", "RankError", "Ranks", "Strategy", "Zero1", "Zero2"]
