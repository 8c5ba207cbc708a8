"""Who trains: this process alone or ranks, which torchrun or this program has started; and what ends them."""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from pytrain.steps import step as pytrain_step

if TYPE_CHECKING:
    from pytrain.parallel import Ranks, Strategy

StrategyName = Literal["auto", "single", "ddp", "zero1", "zero2"]
STRATEGIES = get_args(StrategyName)
PATIENCE = 60.0  # seconds that the first rank waits, at its end, for those that it has started
STOPPED = 143  # the exit code after a signal: 128 + SIGTERM, as shells have it
_starts = count()


class Alone:
    """What the trainer knows of a `pytrain.parallel.Strategy`, for one process: a step is `pytrain.step` itself."""

    stop = False
    weight = "grad_divisor"  # pytrain.step's name for it

    def __init__(self, optimizer: Optimizer) -> None:
        self.step: Callable[..., Any] = partial(pytrain_step, optimizer)
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    def show_gradients(self, show: Callable[[float], float]) -> None:
        """As `Strategy.show_gradients`."""
        step = self.step

        def shown(scaler: Any, *, grad_divisor: float = 1.0, **options: Any) -> Any:
            return step(scaler, grad_divisor=show(grad_divisor), **options)

        self.step = shown

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients add up as autograd has them."""
        return nullcontext()

    def close(self) -> None:
        """There is nobody to send to, and nothing to let go."""

    send_buffers = close


Maker: TypeAlias = "Callable[[torch.nn.Module, Optimizer], Strategy]"


@dataclass
class Team:
    """This process alone (`ranks` is None), or the ranks of the default process group.

    Args:
        name: the strategy, as errors call it.
        make: how it is made; None: this process is alone.
    """

    name: str
    make: Maker | None = None
    ranks: Ranks | None = None
    rank: int = 0
    size: int = 1
    made: list[Strategy] = field(default_factory=list)

    def strategy(self, module: torch.nn.Module, optimizer: Optimizer) -> Alone | Strategy:
        """Make the strategy of an optimizer.

        Raises:
            TypeError: the callable that the trainer was given returned something else.
        """
        if self.make is None:
            return Alone(optimizer)
        from pytrain.parallel import Strategy

        module.zero_grad(set_to_none=True)  # the optimizer's may be of pieces from here on
        made = self.make(module, optimizer)
        if not isinstance(made, Strategy):
            raise TypeError(
                f"Trainer: strategy must return a pytrain.parallel.Strategy, {self.name} returned {type(made).__name__}"
            )
        self.made.append(made)
        return made

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        return [value] if self.ranks is None else self.ranks.gather(value)

    def means(self, values: list[float]) -> list[float]:
        """The mean over the ranks of each."""
        return values if self.ranks is None or not values else [one / self.size for one in self.ranks.sum(values)]

    def check_alike(self, what: str, facts: Sequence[str]) -> None:
        """Raise RuntimeError on all ranks where one of them has other facts."""
        if self.ranks is not None:
            self.ranks.check_alike(what, facts)

    def while_all_have(self, batches: Iterator[Any]) -> Iterator[Any]:
        """An epoch of unknown length ends for all ranks where the first has no more; costs a small sum a batch."""
        nothing = object()
        while self.means([float((batch := next(batches, nothing)) is not nothing)]) == [1.0]:
            yield batch

    def say(self, text: str) -> None:
        """Print one line, on rank 0."""
        if self.rank == 0:
            print(f"pytrain: {text}", file=sys.stderr, flush=True)

    def seed_of(self, *words: object) -> int:
        """A seed of this rank's own, 0 to 2**32 - 1, which depends on the words."""
        return int.from_bytes(hashlib.sha256(repr((self.rank, *words)).encode()).digest()[:4], "little")


def under_torchrun() -> bool:
    """Whether a launcher has said which of several processes this is."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def open_team(strategy: StrategyName | Maker, device: torch.device) -> Iterator[Team]:
    """Find the ranks, or start torch.distributed as torchrun's environment says; what was started ends here again.

    Args:
        strategy: as `Trainer` has it.
        device: of the module; picks nccl for CUDA and gloo for all else.

    Raises:
        RuntimeError: torch has no torch.distributed.
    """
    there = dist.is_available() and dist.is_initialized()
    if strategy == "auto":
        several = dist.get_world_size() > 1 if there else under_torchrun()
        strategy = "ddp" if several else "single"
    if strategy == "single":
        yield Team("strategy='single'")
        return
    if not dist.is_available():
        raise RuntimeError(
            f"Trainer: strategy={strategy!r} needs torch.distributed, which this torch was built without"
        )
    if not there:
        _start(device)
    team = Team("")
    try:
        from pytrain import parallel

        name = f"strategy={strategy!r}" if isinstance(strategy, str) else "strategy=a callable"
        kinds: dict[str, Maker] = {kind.name: kind for kind in (parallel.DDP, parallel.Zero1, parallel.Zero2)}
        ranks = parallel.Ranks()
        team = Team(name, kinds[strategy] if isinstance(strategy, str) else strategy, ranks, ranks.rank, ranks.size)
        yield team
    finally:
        for made in team.made:
            made.abandon()  # closed already, but after an error
        if not there:
            dist.destroy_process_group()


def _start(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = _meeting()
    # Under a prefix of its own: a second start, and torchrun's restart, must not find where ranks were before.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"pytrain/{restart}/{next(_starts)}", store)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)


@lru_cache(maxsize=1)
def _meeting() -> tuple[Any, int, int]:
    """The store where the ranks meet, this one's number and how many there are. Without a launcher: one."""
    if not under_torchrun():
        return dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    meeting: tuple[Any, int, int] = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    return meeting


def start_ranks(devices: int) -> None:
    """Run this program again, once for each further rank, as torchrun does; this process is rank 0 from now on.

    Does nothing under a launcher, or where this was called before. The others end with this process.

    Raises:
        RuntimeError: there is no program to run again, as in a notebook.
    """
    if devices == 1 or under_torchrun():
        return
    program = sys.orig_argv[1:]
    if hasattr(sys, "ps1") or not program or "ipykernel" in sys.modules:
        raise RuntimeError(
            f"Trainer: devices={devices} runs the program again for each rank, and this is an interactive session; put "
            f"it in a file, or start it by torchrun --nproc-per-node {devices} file.py"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": devices, "LOCAL_WORLD_SIZE": devices, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // devices))}
    os.environ |= {name: str(value) for name, value in (shared | {"RANK": 0, "LOCAL_RANK": 0}).items()}
    others = [
        subprocess.Popen([sys.executable, *program], env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(1, devices)
    ]
    atexit.register(_end, others)


def _end(others: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the other ranks, and end those that do not."""
    for other in others:
        try:
            other.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            other.terminate()


class Stoppable(Protocol):
    """What is asked to stop."""

    should_stop: bool


def seconds_of(value: Any) -> float | None:
    """Read max_time as Lightning has it: "days:hours:minutes:seconds", a timedelta or its arguments; or seconds."""
    try:
        if isinstance(value, str):
            days, hours, minutes, seconds = map(int, value.split(":"))
            value = {"days": days, "hours": hours, "minutes": minutes, "seconds": seconds}
        if isinstance(value, Mapping):
            value = timedelta(**value)
    except (TypeError, ValueError):
        value = math.nan
    found = value.total_seconds() if isinstance(value, timedelta) else value
    if found is not None and not (isinstance(found, (int, float)) and 0 < found < math.inf):
        raise ValueError(
            'Trainer: max_time must be "days:hours:minutes:seconds", a timedelta, its arguments as a dict, or seconds '
            f"> 0; got {value!r}"
        )
    return found


@dataclass
class Stops:
    """What has been asked of the run under way."""

    signal: int = 0


@contextmanager
def watch(trainer: Stoppable, *, max_time: float | None, signals: bool) -> Iterator[Stops]:
    """Set `trainer.should_stop` on SIGTERM or SIGUSR1, and after `max_time` seconds.

    Signals are watched in the main thread only, and left alone where a handler is set already; at the end all is as it
    was.
    """
    stops = Stops()

    def stop(number: int = 0, frame: Any = None) -> None:
        stops.signal = stops.signal or number
        trainer.should_stop = True

    main = threading.current_thread() is threading.main_thread()
    watched = [one for one in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(one) is signal.SIG_DFL]
    watched = watched if main and signals else []
    timer = None if max_time is None else threading.Timer(max_time, stop)
    for one in watched:
        signal.signal(one, stop)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield stops
    finally:
        if timer is not None:
            timer.cancel()
        for one in watched:
            signal.signal(one, signal.SIG_DFL)
