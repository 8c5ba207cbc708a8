"""For users' tests: `assert_same_training` says where two trainings first differ, such as a loop and its module."""

from __future__ import annotations

from pytrain.parity import check
from pytrain.parity.compare import Difference, Parity
from pytrain.parity.run import ParityError, Training

__all__ = ["Difference", "Parity", "ParityError", "Training", "assert_same_training"]


def assert_same_training(a: Training, b: Training, *, steps: int = 10, seed: int = 0, tolerance: float = 0.0) -> Parity:
    """Assert that two trainings have the same loss, gradients and parameters at each of their first steps.

    A training is a Python file, which runs in a process of its own; or a callable without arguments, which runs here,
    from the same seed. What it does is recorded by torch's optimizer hooks, so that an ordinary loop needs no change; a
    file or callable that gives (module, batches) or (module, batches, trainer) instead, the file by its function
    `make`, has `pytrain.Trainer` train that `pytrain.Module`. Both should take the same few batches in the same order.

    Args:
        a, b: the trainings; one file may carry arguments: "train.py --lr 0.1".
        steps: optimizer steps to compare, >= 1; the trainings are ended after them. Skipped ones do not count.
        seed: of torch, python and numpy when a training starts.
        tolerance: the largest difference that passes, relative to the largest element of a's tensor, >= 0; 0: exact.

    Returns:
        The outcome: how names were matched, and the largest differences that were seen.

    Shape: gradients are compared as the optimizer applies them: unscaled, averaged over micro-batches and clipped.

    Raises:
        AssertionError: they differ; the message names the first step and tensors, sizes, and what it looks like.
        ParityError: a file failed or does not exist, or a training made no optimizer step.
        ValueError: steps or tolerance are out of their range, or an optimizer has `step_in_backward=True`.
    """
    outcome = check(a, b, steps=steps, seed=seed, tolerance=tolerance)
    if not outcome.same:
        raise AssertionError(str(outcome))
    return outcome
