"""Callbacks: what may happen beside the training loop. `Callback` has the hooks; the others here are ready to use."""

from pytrain.callbacks.averages import EMA, StochasticWeightAveraging
from pytrain.callbacks.base import Callback
from pytrain.callbacks.checkpoint import ModelCheckpoint
from pytrain.callbacks.display import RichProgressBar
from pytrain.callbacks.measure import LearningRateMonitor, Profiler, Throughput
from pytrain.callbacks.stopping import EarlyStopping

__all__ = [
    "EMA",
    "Callback",
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "Profiler",
    "RichProgressBar",
    "StochasticWeightAveraging",
    "Throughput",
]
