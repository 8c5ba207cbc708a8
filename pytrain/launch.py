"""Who trains: this process alone or ranks, which torchrun or this program has started; and what ends them."""

from __future__ import annotations

import atexit
import hashlib
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
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
SHORT_PATIENCE = 5.0  # the same after an error, and what a rank has to come to its own end when another is gone
_PARENT = "PYTRAIN_PARENT"  # in a started rank's environment: the process that has started it
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


def start_ranks(devices: int, strategy: StrategyName | Maker) -> None:
    """Run this program again, once for each further rank, as torchrun does; this process is rank 0 from now on.

    Does nothing under a launcher, or where this was called before. The others end with this process, and it with them
    where one fails.

    Raises:
        RuntimeError: there is no program to run again, as in a notebook.
        ValueError: the strategy is that of one process.
    """
    if _PARENT in os.environ:
        _watch_parent(int(os.environ.pop(_PARENT)))
    if devices > 1 and strategy == "single":
        raise ValueError(
            f"Trainer: devices={devices} are several ranks, strategy='single' is this process alone; leave it \"auto\""
        )
    if devices == 1 or under_torchrun():
        return
    reason = _why_not_again()
    if reason is not None:
        raise RuntimeError(
            f"Trainer: devices={devices} runs the program again for each rank, and {reason}; put it in a file, or "
            f"start it by torchrun --nproc-per-node {devices} file.py"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": devices, "LOCAL_WORLD_SIZE": devices, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if "OMP_NUM_THREADS" not in os.environ:  # as many on every rank
        shared["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // devices)
        torch.set_num_threads(shared["OMP_NUM_THREADS"])
    os.environ |= {name: str(value) for name, value in (shared | {"RANK": 0, "LOCAL_RANK": 0}).items()}
    program, others = [sys.executable, *sys.orig_argv[1:]], []
    for rank in range(1, devices):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), _PARENT: str(os.getpid())}
        others.append(subprocess.Popen(program, env=os.environ | own))
    atexit.register(_end, others)
    threading.Thread(target=_watch_ranks, args=(others,), daemon=True).start()


def _why_not_again() -> str | None:
    """Why this program cannot be run again; None: it can."""
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules or "-i" in sys.orig_argv[1:2]:
        return "this is an interactive session"
    if multiprocessing.parent_process() is not None:
        return "this is a process that another has started to run one function"
    if "-c" not in sys.orig_argv and not hasattr(sys.modules["__main__"], "__file__"):
        return "it came in by the standard input"
    return None


def _watch_parent(parent: int) -> None:
    """In a started rank: end with the process that has started it, which may be killed before the ranks have met."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(SHORT_PATIENCE)  # an error of its own says more
        _leave(1, "rank 0 is gone, and this rank ends too")

    threading.Thread(target=watch, daemon=True).start()


def _watch_ranks(others: list[subprocess.Popen[bytes]]) -> None:
    """In the first rank: end where another has failed, which this one may be waiting for in vain."""
    while not any(map(_failed, others)):
        if all(other.poll() is not None for other in others):
            return
        time.sleep(0.2)
    time.sleep(SHORT_PATIENCE)  # for an error of its own
    _end(others)


def _failed(other: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended, and not as all ranks do."""
    return other.poll() not in (None, 0, STOPPED)


def _end(others: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the other ranks, and end those that do not end; where one has failed, this process fails too."""
    own_error = hasattr(sys, "last_value")
    late = time.monotonic() + (SHORT_PATIENCE if own_error or any(map(_failed, others)) else PATIENCE)
    while any(other.poll() is None for other in others) and time.monotonic() < late:
        time.sleep(0.02)
    numbered = list(enumerate(others, 1))
    why = [f"rank {rank} ended with exit code {each.returncode}" for rank, each in numbered if _failed(each)]
    for rank, other in numbered:
        if other.poll() is None:
            why.append(f"rank {rank} did not come to its end, and was killed")
            other.terminate()
            try:
                other.wait(SHORT_PATIENCE)
            except subprocess.TimeoutExpired:
                other.kill()
                other.wait()
    if why and not own_error:
        _leave(1, "; ".join(why))


def _leave(code: int, why: str) -> None:
    """End this process from any thread, whatever it waits for."""
    print(f"pytrain: {why}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


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
    """What has been asked of the run under way.

    Args:
        signal: which came first; 0: none.
        leave: a signal came to one of the ranks, and all know of it.
    """

    signal: int = 0
    leave: bool = False

    def agree(self, team: Team) -> bool:
        """Have all ranks know whether a signal came to any of them."""
        self.leave = any(team.gather(bool(self.signal))) or self.leave
        return self.leave

    def obey(self, team: Team, finish: Callable[[], None], step: int) -> None:
        """End the program where a signal came, as soon as `finish` has written what there is.

        Raises:
            SystemExit: it came.
        """
        if self.agree(team):
            finish()
            team.gather(None)  # no rank ends, and has a launcher end all, before the file is there
            team.say(f"stopped by a signal at step {step}; ckpt_path='last' goes on from there")
            raise SystemExit(STOPPED)


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
            if signal.getsignal(one) is stop:  # else somebody has set another since
                signal.signal(one, signal.SIG_DFL)
    if stops.signal and not stops.leave:
        signal.raise_signal(stops.signal)  # it came when all was done: it ends the program, as it would a moment later
