"""Where metrics go: `Logger` says what a logger does; CSV, TensorBoard, Weights & Biases and MLflow are here."""

from pytrain.loggers.base import Logger
from pytrain.loggers.csv import CSVLogger
from pytrain.loggers.remote import MLFlowLogger, WandbLogger
from pytrain.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]
