"""The demo, `python -m pytrain demo`: three models trained with torch and with pytrain, compared step by step."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytrain.launch import Team

TASKS = ("digits", "gpt", "fashion")
PROMPT = "def "
ON_RANKS = ("ddp", "zero1", "zero2")


def main(argv: list[str]) -> int:
    """Run the demo.

    Args:
        argv: the command line after `python -m pytrain demo`.

    Returns:
        0 if every check passed; 1 if losses differ too much or a model is not good enough; 2 if it could not run.
    """
    import torch

    from pytrain.demo.data import DemoError
    from pytrain.launch import open_team, under_torchrun

    args = _parse(argv)
    try:
        if args.strategy is not None and not under_torchrun():
            raise DemoError(
                f"--strategy {args.strategy} trains on several ranks; start them with "
                f"torchrun --nproc-per-node 2 -m pytrain demo {' '.join(argv)}"
            )
        if args.strategy is None:
            args.strategy = "ddp" if under_torchrun() else "single"
        with open_team(args.strategy, torch.device("cpu")) as team:
            return int(team.gather(_run(args, team, options=" ".join(argv)))[0])
    except DemoError as error:
        print(f"pytrain demo: error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pytrain demo",
        description="Train small models on real data with torch and with pytrain, and compare them step by step.",
        epilog="Exit status: 0 all checks passed, 1 a check failed, 2 the demo could not run.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps: under a minute instead of under five")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="where to write the report (%(default)s)")
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's four IDX files, gzipped or not")
    parser.add_argument("--seed", type=_seed, default=0, help="of weights and data order, 0 to 2**32 - 1 (%(default)s)")
    parser.add_argument(
        "--tasks", type=_tasks, default=TASKS, metavar="NAMES", help=f"some of {','.join(TASKS)} (all of them)"
    )
    parser.add_argument(
        "--strategy",
        choices=ON_RANKS,
        help="train pytrain's runs on the ranks that torchrun has started (ddp there, else in one process)",
    )
    return parser.parse_args(argv)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def _tasks(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(TASKS)}, got {unknown[0]!r}")
    return tuple(name for name in TASKS if name in names)


def _run(args: argparse.Namespace, team: Team, *, options: str) -> int:
    from pytrain.demo.data import DemoError, missing_extra

    started = perf_counter()
    _check_out(args.out)
    for package, module, needed in (
        ("matplotlib", "matplotlib.figure", True),
        ("scikit-learn", "sklearn.datasets", "digits" in args.tasks),
    ):
        if needed:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise missing_extra(package, error) from error
    from pytrain.demo.compare import compare
    from pytrain.demo.mixed import train_mixed
    from pytrain.demo.models import CharGPT, write
    from pytrain.demo.report import Sample, print_table, write_report
    from pytrain.demo.tasks import FASHION_MISSING, QUICK, make_task

    def say(line: str) -> None:
        if team.rank == 0:
            print(line, flush=True)

    tasks, left_out = [], []
    for name in args.tasks:
        task = make_task(name, quick=args.quick, seed=args.seed, data_dir=args.data_dir)
        if task is None:
            left_out.append(FASHION_MISSING)
            say(FASHION_MISSING)
        elif task.settings.batch % team.size:
            raise DemoError(f"{name}: its batches of {task.settings.batch} do not divide by {team.size} ranks")
        else:
            tasks.append(task)
    if not tasks:
        raise DemoError("nothing to train; see the line above")

    comparisons, samples = [], []
    for task in tasks:
        say(f"{task.name}: {task.title}; {task.about}")
        comparisons.append(compare(task, seed=args.seed, report=say, team=team, strategy=args.strategy))
        model = comparisons[-1].model
        if isinstance(model, CharGPT) and team.rank == 0:
            samples.append(Sample(task.name, write(model, PROMPT, length=200 if args.quick else 500, seed=args.seed)))
    in_fp16 = []
    for task in tasks:
        if task.name == "digits":
            goal = QUICK["digits"].goal
            in_fp16 += train_mixed(task, goal=goal, seed=args.seed, team=team, strategy=args.strategy)
    if team.rank > 0:
        return 0  # the first has it all
    print_table(comparisons)
    verdicts = [(one.task.name, verdict) for one in comparisons for verdict in one.verdicts()]
    verdicts += [("digits, fp16", verdict) for verdict in in_fp16]
    for name, verdict in verdicts:
        print(f"{'ok  ' if verdict.passed else 'FAIL'}  {name}: {verdict.text}")
    try:
        write_report(args.out, comparisons, samples=samples, left_out=left_out, options=options)
    except OSError as error:
        raise DemoError(f"--out: cannot write {args.out}: {error}") from error
    print(f"report: {args.out} ({perf_counter() - started:.0f} s)")
    return 0 if all(verdict.passed for _, verdict in verdicts) else 1


def _check_out(path: Path) -> None:
    """Find out before training, not after, whether the report can be written."""
    from pytrain.demo.data import DemoError

    if path.is_dir():
        raise DemoError(f"--out: expected a file name, got the folder {path}")
    target = path if path.exists() else path.parent
    if not path.parent.is_dir() or not os.access(target, os.W_OK):
        raise DemoError(f"--out: expected a path that can be written, got {path}")
