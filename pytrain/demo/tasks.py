"""The demo's three tasks: what is trained on what, for how long, and what it must reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytrain.demo.data import Batches, DemoError, Split, find_fashion, load_digits, load_idx_images, load_text, shuffled
from pytrain.demo.models import CharGPT, ConvNet

NAMES = ("digits", "gpt", "fashion")
CONTEXT = 64
FASHION_MISSING = (
    "fashion: left out, there is no Fashion-MNIST here; install it (Debian: apt install dataset-fashion-mnist) "
    "or name the folder of its four IDX files with --data-dir"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is trained.

    Args:
        steps: optimizer steps, >= 1.
        batch: examples a step, >= 1.
        lr: the highest learning rate; it rises over the first twentieth of the steps and falls to a tenth as a cosine.
        betas: AdamW's decay rates, each in [0, 1).
        weight_decay: AdamW's, >= 0.
        goal: the held-out result that must be reached: the accuracy from below, in percent, or the loss from above.
    """

    steps: int
    batch: int
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    goal: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to train. `build` draws from torch's global random state; `score` is "%" accuracy or a loss."""

    name: str
    title: str
    about: str
    unit: str
    settings: Settings
    build: Callable[[], nn.Module]
    batches: Batches
    score: Callable[[nn.Module], float]

    def reached(self, score: float) -> bool:
        """Return whether a held-out result is as good as the goal."""
        return score >= self.settings.goal if self.unit == "%" else score <= self.settings.goal


FULL = {
    "digits": Settings(steps=600, batch=64, lr=4e-3, betas=(0.9, 0.999), weight_decay=0.01, goal=97.0),
    "gpt": Settings(steps=800, batch=8, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, goal=1.9),
    "fashion": Settings(steps=500, batch=128, lr=4e-3, betas=(0.9, 0.999), weight_decay=0.01, goal=85.0),
}
QUICK = {
    "digits": Settings(steps=150, batch=64, lr=6e-3, betas=(0.9, 0.999), weight_decay=0.01, goal=93.0),
    "gpt": Settings(steps=100, batch=8, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, goal=3.0),
    "fashion": Settings(steps=80, batch=128, lr=6e-3, betas=(0.9, 0.999), weight_decay=0.01, goal=72.0),
}


def make_task(name: str, *, quick: bool, seed: int, data_dir: Path | None) -> Task | None:
    """Load the data of one task and return it ready to train, or None where Fashion-MNIST is not there.

    Args:
        name: one of NAMES.
        quick: fewer steps, and lower goals.
        seed: of the order of the data.
        data_dir: folder of Fashion-MNIST's IDX files; None looks where Debian installs them.

    Raises:
        DemoError: the data cannot be read, or has fewer examples than a batch.
    """
    settings = (QUICK if quick else FULL)[name]
    if name == "digits":
        return _image_task(
            name, load_digits(), settings, partial(ConvNet, side=8, white=16, hidden=64), seed,
            title="Convolutional network on handwritten digits",
            about="scikit-learn's scanned digits, 8 x 8 pixels",
        )  # fmt: skip
    if name == "gpt":
        return _gpt_task(settings, seed)
    folder = find_fashion(data_dir)
    if folder is None:
        return None
    return _image_task(
        name, load_idx_images(folder), settings, partial(ConvNet, side=28, white=255, hidden=128), seed,
        title="Convolutional network on Fashion-MNIST",
        about="Fashion-MNIST, photographs of clothes, 28 x 28 pixels",
    )  # fmt: skip


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross entropy of a batch, in nats an example or a character."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def _image_task(
    name: str, data: Split, settings: Settings, build: Callable[[], nn.Module], seed: int, *, title: str, about: str
) -> Task:
    train, test = len(data.train_inputs), len(data.test_inputs)
    if train < settings.batch:
        raise DemoError(f"{name}: expected at least {settings.batch} images to train on, got {train}")
    order = shuffled(train, batch=settings.batch, steps=settings.steps, seed=seed)
    return Task(
        name=name,
        title=title,
        about=f"{about}; {train:,} to train on, {test:,} held out",
        unit="%",
        settings=settings,
        build=build,
        batches=Batches(data.train_inputs, data.train_targets, order),
        score=partial(_accuracy, data),
    )


def _gpt_task(settings: Settings, seed: int) -> Task:
    data = load_text(context=CONTEXT)
    count = len(data.train_inputs)
    return Task(
        name="gpt",
        title="Character-level GPT on Python's standard library",
        about=f"the library's own source text; {count:,} characters to train on, {data.test_inputs.numel():,} held out",
        unit="nats/char",
        settings=settings,
        build=partial(CharGPT, context=CONTEXT),
        batches=Batches(data.train_inputs, data.train_targets, _starts(count, settings, seed)),
        score=partial(_mean_loss, data),
    )


def _starts(count: int, settings: Settings, seed: int) -> Tensor:
    """Return where the windows of each step start; windows overlap, so they are drawn, not shuffled."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (settings.steps, settings.batch), generator=generator)


@torch.no_grad()
def _accuracy(data: Split, model: nn.Module) -> float:
    pairs = zip(torch.split(data.test_inputs, 1000), torch.split(data.test_targets, 1000), strict=True)
    right = sum(int((model(inputs).argmax(-1) == targets).sum()) for inputs, targets in pairs)
    return 100.0 * right / len(data.test_targets)


@torch.no_grad()
def _mean_loss(data: Split, model: nn.Module) -> float:
    return float(loss_of(model, (data.test_inputs, data.test_targets)))
