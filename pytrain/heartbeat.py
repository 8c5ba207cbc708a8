"""What a rank says when a collective fails: who has died or left, found by heartbeats in the store, and in what."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

BEAT_SECONDS = 1.0  # between two heartbeats of a rank
MISSED = 3  # beats after which a rank that tells nothing has died
LISTED = 3  # ranks that a message tells of
ELSEWHERE = "its own computation"


class RankError(RuntimeError):
    """Another rank has died or left, or does something else; says which, and in what operation this one was."""


class Beat(NamedTuple):
    """What a rank has told last: when, by its clock, in what it was, why it tells no more, and who is to blame."""

    time: float = 0.0
    what: str = "nothing"
    left: str = ""
    found: str = ""


class Heart:
    """Tells the other ranks that this one lives, and in what operation it is: a thread writes both to a store.

    Args:
        store: a store of torch.distributed, on a connection of its own; None: nothing is told, and nothing asked.
        rank: this rank's number among all.
        world: the process group with which it ends; None: it ends with the program.

    Attributes:
        now: the operation.
        steps: how many steps this rank has taken.
    """

    def __init__(self, store: Any, rank: int, world: dist.ProcessGroup | None = None) -> None:
        self.now, self.steps, self.store, self.rank = ELSEWHERE, 0, store, rank
        self._found, self._begin = "", time.time()
        self._world = None if world is None else weakref.ref(world)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pytrain-heart", daemon=True)
        if store is not None:
            self._tell()
            self._thread.start()
            atexit.register(self.stop)

    def serves(self, world: dist.ProcessGroup | None) -> bool:
        """Whether it beats for this process group."""
        return self._world is None or (world is not None and self._world() is world)

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: `explain` will see that
            while not self._ended.wait(BEAT_SECONDS):
                if not self.serves(dist.group.WORLD):
                    return self._tell(f"has left the process group, after {self.steps} steps")
                self._tell()

    def _tell(self, left: str = "") -> None:
        if self.store is not None:
            what = f"{self.now}, after {self.steps} steps"
            self.store.set(str(self.rank), "\n".join([str(time.time()), what, left, self._found]))

    def stop(self) -> None:
        """The program ends: tell why."""
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        error = getattr(sys, "last_value", None)  # what nobody has caught
        if error is not None and not self._found:
            self._found = f"rank {self.rank} has left with {type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            self._tell(f"has ended its program, after {self.steps} steps")

    # ---- after an error ---------------------------------------------------------------------------------------------

    def explain(self, what: str, ranks: Sequence[int]) -> str:
        """Who is to blame for this rank's error in an operation of `ranks`; waits for a few beats of theirs."""
        own = f"{what}, after {self.steps} steps"
        me = f"while this rank, {self.rank}, was in {own}"
        try:
            beats = self._look([rank for rank in ranks if rank != self.rank])
        except RuntimeError:
            return f"rank 0, or its launcher, which keeps the store, has died or cannot be reached, {me}"
        left = [f"rank {rank} {beat.left}" for rank, beat in beats.items() if beat.left]
        if self._found or left:
            return f"{self._found or _some(left)}, {me}"
        others = [f"rank {rank} in {beat.what}" for rank, beat in beats.items() if beat.what != own]
        return f"no rank has died, {me}; {_some(others) or 'others too'}: ranks must do the same within their timeout"

    def _look(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """What these ranks tell after a few beats, or as soon as one knows the cause."""
        begin, waited = time.monotonic(), 0.0
        beats = first = self._listen(ranks)
        while not self._found and waited <= MISSED * BEAT_SECONDS:
            time.sleep(BEAT_SECONDS / 4)
            beats, waited = self._listen(ranks), time.monotonic() - begin
            self._found = next((b.found for b in beats.values() if b.found and b.time > self._begin), "")
        silent = [rank for rank, beat in beats.items() if beat.time == first[rank].time and not beat.left]
        if silent and not self._found:
            silence = f"no heartbeat for {waited:.1f} s; last heard of in"
            self._found = _some([f"rank {rank} has died ({silence} {beats[rank].what})" for rank in silent])
            self._tell()
            if self.rank == 0:  # with which the store may end: others are to read this
                time.sleep(BEAT_SECONDS)
        return beats

    def _listen(self, ranks: Sequence[int]) -> dict[int, Beat]:
        told = {r: self.store.get(str(r)).decode().split("\n", 3) for r in ranks if self.store.check([str(r)])}
        return {r: Beat(float(told[r][0]), *told[r][1:]) if r in told else Beat() for r in ranks}


def _some(texts: Sequence[str]) -> str:
    return "; ".join(texts[:LISTED]) + (f"; and {len(texts) - LISTED} ranks more" if len(texts) > LISTED else "")


_hearts: list[Heart] = []  # that of the default process group


def heart() -> Heart:
    """The heart of this process, which beats from the first call until the default process group is destroyed."""
    world: Any = dist.group.WORLD
    if not (_hearts and _hearts[0].serves(world)):
        store = None
        if world.size() > 1:
            with contextlib.suppress(RuntimeError):  # a group that only plays ranks has no store
                store = dist.PrefixStore("pytrain", world.get_group_store().clone())  # type: ignore[attr-defined]
        _hearts[:] = [Heart(store, world.rank(), world)]
    return _hearts[0]


def is_of_ranks(error: RuntimeError) -> bool:
    """Whether an error comes from what carries collectives: torch names its errors, and Gloo its source file."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/" in str(error))
