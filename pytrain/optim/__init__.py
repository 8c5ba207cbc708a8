"""Drop-in replacements for torch.optim's optimizers, and optimizers that torch does not have."""

from pytrain.optim.adabelief import AdaBelief
from pytrain.optim.adadelta import Adadelta
from pytrain.optim.adafactor import Adafactor
from pytrain.optim.adagrad import Adagrad
from pytrain.optim.adam import Adam
from pytrain.optim.adamax import Adamax
from pytrain.optim.adamw import AdamW
from pytrain.optim.adan import Adan
from pytrain.optim.ademamix import AdEMAMix
from pytrain.optim.asgd import ASGD
from pytrain.optim.base import REGISTRY, FusedOptimizer
from pytrain.optim.cautious import CautiousAdamW, CautiousLion
from pytrain.optim.fuse import fuse
from pytrain.optim.lamb import LAMB
from pytrain.optim.lars import LARS
from pytrain.optim.lion import Lion
from pytrain.optim.muon import Muon
from pytrain.optim.nadam import NAdam
from pytrain.optim.novograd import NovoGrad
from pytrain.optim.radam import RAdam
from pytrain.optim.rmsprop import RMSprop
from pytrain.optim.rprop import Rprop
from pytrain.optim.schedulefree import ScheduleFreeAdamW
from pytrain.optim.sgd import SGD
from pytrain.optim.stableadamw import StableAdamW

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "REGISTRY",
    "SGD",
    "AdEMAMix",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "CautiousAdamW",
    "CautiousLion",
    "FusedOptimizer",
    "Lion",
    "Muon",
    "NAdam",
    "NovoGrad",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "StableAdamW",
    "fuse",
]
