"""What ends a run from outside: a signal (spot instances, Slurm) or the clock."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

STOPPED = 143  # the exit code after a signal: 128 + SIGTERM, as shells have it


class Stoppable(Protocol):
    """What is asked to stop."""

    should_stop: bool


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
