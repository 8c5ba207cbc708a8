"""The parity check, `python -m pytrain parity a.py b.py`: do two training scripts do the same, step by step?"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytrain.parity.compare import Parity
    from pytrain.parity.run import Training

HELP = """
A file is a training script as it is: it runs in a process of its own, as `python FILE` would, from the given seed,
and is ended after STEPS optimizer steps. Or it defines make(), which returns (module, batches) or (module, batches,
trainer): a pytrain.Module that pytrain.Trainer trains on them. Arguments go in the same word: "train.py --lr 0.1".

Loss, gradients as the optimizer applies them (unscaled, averaged, clipped) and parameters are compared at each step,
and the first that differs is named. Give both the same few batches, in the same order, and build the model first.
"""


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the command line after `python -m pytrain parity`.

    Returns:
        0 if the trainings are the same; 1 if they differ; 2 if one could not be run.
    """
    args = _parse(argv)
    from pytrain.parity.run import ParityError

    try:
        outcome = check(args.a, args.b, steps=args.steps, seed=args.seed, tolerance=args.tolerance)
    except ParityError as error:
        print(f"pytrain parity: error: {error}", file=sys.stderr)
        return 2
    print(outcome)
    return 0 if outcome.same else 1


def check(a: Training, b: Training, *, steps: int, seed: int, tolerance: float) -> Parity:
    """Run two trainings, one after the other, and compare them.

    Raises:
        ParityError: one could not be run, or made no optimizer step.
        ValueError: steps or tolerance are out of their range.
    """
    from pytrain.parity.compare import compare
    from pytrain.parity.run import command_of, record

    if steps < 1:
        raise ValueError(f"steps: expected a whole number >= 1, got {steps!r}")
    if not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a finite number >= 0, got {tolerance!r}")
    labels = [getattr(one, "__name__", "a callable") if callable(one) else command_of(one)[0] for one in (a, b)]
    if labels[0] == labels[1]:
        labels = [f"{label} ({place})" for label, place in zip(labels, ("first", "second"), strict=True)]
    with tempfile.TemporaryDirectory(prefix="pytrain-parity-") as root:
        recordings = []
        for i, one in enumerate((a, b)):
            folder = Path(root) / str(i)
            folder.mkdir()
            recordings.append(record(one, folder, label=labels[i], steps=steps, seed=seed))
        return compare(recordings[0], recordings[1], tolerance)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pytrain parity",
        description="Find the first step and tensor in which two trainings differ." + HELP,
        epilog="Exit status: 0 the same, 1 different, 2 one could not be run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", help="a training script")
    parser.add_argument("b", help="another, or a file with make()")
    parser.add_argument("--steps", type=_count, default=10, help="optimizer steps to compare, >= 1 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of torch, python and numpy, in both (%(default)s)")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=0.0,
        help="the largest difference that passes, relative to a tensor's largest element, >= 0 (0: exact)",
    )
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text!r}")
    return value
