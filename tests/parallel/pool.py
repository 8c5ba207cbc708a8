"""Processes that stand for ranks: started once, they run one function after the other over Gloo."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 4
SECONDS = 120.0  # until a function that does not come back fails its test


def serve(rank: int, size: int, store: str, calls: Connection) -> None:
    """A rank's process: runs what comes, until nothing comes any more."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size + 1)}
    while True:
        try:
            function, n, args = calls.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            calls.send((True, function(groups[n], *args)))
        except BaseException:  # noqa: BLE001  whatever it is, the test is to see it
            calls.send((False, traceback.format_exc()))


class Pool:
    """Ranks that wait for work."""

    def __init__(self, size: int = SIZE) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            args = (rank, size, str(Path(self.folder.name) / "store"), there)
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(group, *args)` returns on each of n ranks.

        Raises:
            AssertionError: it raised on one of them, or does not come back.
        """
        for pipe in self.pipes[:n]:
            pipe.send((function, n, args))
        results = []
        for rank, pipe in enumerate(self.pipes[:n]):
            if not pipe.poll(SECONDS):
                self.close()
                raise AssertionError(f"rank {rank} did not answer in {SECONDS} s")
            results.append(pipe.recv())
        errors = [f"rank {rank}:\n{value}" for rank, (good, value) in enumerate(results) if not good]
        assert not errors, "\n".join(errors)
        return [value for _, value in results]

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


if sys.platform != "linux":
    raise ImportError("the ranks' processes are tested on Linux")
