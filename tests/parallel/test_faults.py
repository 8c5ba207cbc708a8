"""Ranks that die: the others name them, a launcher starts all again, and nothing is lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import fault_jobs
import pytest
import torch
import torch.distributed as dist
import worker
from pool import Pool

from pytrain import heartbeat
from pytrain.heartbeat import Heart, is_of_ranks

Point = tuple[str, int, int, str]  # strategy, rank, step, place: see worker.py

# ---- killed under torchrun ------------------------------------------------------------------------------------------


def draw(seed: int) -> Point:
    """A point at random at which a rank is killed; seeds one after the other take turns at the places."""
    pick = random.Random(seed)
    places = [place for place in (*worker.IN_STEP, *worker.IN_CHECKPOINT) if place != "error"]
    place = places[seed % len(places)]
    strategy = pick.choice(["Zero1", "Zero2"] if place == "gather" else ["DDP", "Zero1", "Zero2"])
    rank = 0 if place in ("write", "rename") else pick.choice([0, 1])
    steps = range(worker.STEPS - 1)  # after the last one nobody would miss it
    if place in worker.IN_CHECKPOINT:
        steps = steps[worker.EVERY - 1 :: worker.EVERY]
    return strategy, rank, pick.choice(steps), place


def operation(strategy: str, step: int, place: str) -> str:
    """In what the other rank is when it misses one that was killed there."""
    if place == "agree":
        return f"the agreement on a step, after {step} steps"
    if place == "gather":
        return f"the gathering of parameters, after {step} steps"
    whole = place in ("between", *worker.IN_CHECKPOINT)  # the step is done
    gathers = place == "state" or (place == "between" and step % worker.EVERY == worker.EVERY - 1)
    return "the gathering of the state" if gathers and strategy != "DDP" else f"after {step + whole} steps"


def launch(folder: Path, point: Point) -> None:
    """Train to the end under torchrun, which may start the ranks again."""
    # By default torchrun (2.13) starts ranks again beside a store where Gloo finds the addresses of dead ones.
    options = {"PYTRAIN_CUDA": "0", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(worker.SIZE)]
    command += ["--max-restarts", "3", str(Path(worker.__file__)), str(folder), *map(str, point)]
    done = subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def said(folder: Path) -> dict[str, list[str]]:
    """The error of each rank that had one in the first attempt, and what torch said; no attempt after it had any."""
    assert (folder / "done").exists()
    files = {path.name.removeprefix("error-"): path.read_text().split("\n") for path in folder.glob("error-*")}
    assert all(name.endswith("-0") for name in files), files
    return {name[:-2]: lines for name, lines in files.items()}


def check_end(pool: Pool, folder: Path, strategy: str) -> None:
    end = torch.load(folder / "end", weights_only=True)
    for undisturbed in pool.run(worker.SIZE, worker.train, strategy):
        assert all(torch.equal(a, b) for a, b in zip(end, undisturbed, strict=True))


def check_killed(pool: Pool, folder: Path, point: Point) -> None:
    strategy, rank, step, place = point
    launch(folder, point)
    other = 1 - rank
    errors = said(folder)
    assert list(errors) == [str(other)]
    message, cause = errors[str(other)]
    who = "rank 1 has died (no heartbeat for "
    if rank == 0:
        who = "rank 0, or its launcher, which keeps the store, has died or cannot be reached, "
    assert message.startswith(f"RankError: {who}") and f"while this rank, {other}, was in the " in message
    assert message.endswith(operation(strategy, step, place)) or operation(strategy, step, place) in message
    assert "gloo/" in cause
    check_end(pool, folder, strategy)


@pytest.mark.parametrize("point", [("Zero1", 1, 7, "sum"), ("DDP", 0, 5, "write")])
def test_a_killed_rank_is_named_and_nothing_is_lost(pool: Pool, tmp_path: Path, point: Point) -> None:
    check_killed(pool, tmp_path, point)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_killed_anywhere_is_named_and_nothing_is_lost(pool: Pool, tmp_path: Path, seed: int) -> None:
    check_killed(pool, tmp_path, draw(seed))


@pytest.mark.slow
def test_an_error_that_one_rank_alone_meets_is_named_by_the_others(pool: Pool, tmp_path: Path) -> None:
    launch(tmp_path, ("Zero2", 1, 4, "error"))
    errors = said(tmp_path)
    assert errors["1"][0] == "ValueError: a batch of no rows"
    assert errors["0"][0] == (
        "RankError: rank 1 has left with ValueError: a batch of no rows, while this rank, 0, was in the agreement on a "
        "step, after 4 steps"
    )
    check_end(pool, tmp_path, "Zero2")


# ---- what is said ---------------------------------------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat.atexit, "register", lambda function: None)
    monkeypatch.delattr(sys, "last_value", raising=False)
    return dist.HashStore()


def silent(heart: Heart) -> None:
    """Have a heart stop as that of a killed process does: in silence."""
    heart._ended.set()
    heart._thread.join()


def test_who_has_died(store: dist.HashStore) -> None:
    hearts = [Heart(store, rank) for rank in range(4)]
    hearts[2].now, hearts[2].steps = "the sum of bucket 1 of 7", 5
    hearts[2]._tell()
    silent(hearts[2])
    hearts[0].steps = 6
    message = hearts[0].explain("the sum of bucket 3 of 7", range(4))
    start = "rank 2 has died (no heartbeat for 0."
    assert message.startswith(start)
    assert message.endswith(
        " s; last heard of in the sum of bucket 1 of 7, after 5 steps), while this rank, 0, was in the sum of bucket 3 "
        "of 7, after 6 steps"
    )
    hearts[0].stop()  # whoever comes later hears of the first that died, not of those who left for that
    silent(hearts[1])
    message = hearts[3].explain("the agreement on a step", range(4))
    assert message.startswith(start) and "rank 1" not in message and "while this rank, 3, was in" in message
    hearts[3].stop()


def test_ranks_that_nobody_has_heard_of_have_died(store: dist.HashStore) -> None:
    heart = Heart(store, 0)
    message = heart.explain("the check of the model", range(6))
    assert message.startswith("rank 1 has died (no heartbeat for 0.") and message.count(" has died") == 3
    assert "; and 2 ranks more, while" in message
    heart.stop()


def test_who_has_left(store: dist.HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    hearts = [Heart(store, rank) for rank in range(3)]
    hearts[1].steps = 9
    hearts[1].stop()
    assert hearts[0].explain("the agreement on a step", [0, 1]) == (
        "rank 1 has ended its program, after 9 steps, while this rank, 0, was in the agreement on a step, after 0 steps"
    )
    monkeypatch.setattr(sys, "last_value", ValueError("a batch\nof no rows"), raising=False)
    hearts[2].stop()
    assert hearts[0].explain("the agreement on a step", range(3)) == (
        "rank 2 has left with ValueError: a batch\nof no rows, while this rank, 0, was in the agreement on a step, "
        "after 0 steps"
    )
    silent(hearts[0])


def test_what_ranks_said_before_they_were_started_again_does_not_count(store: dist.HashStore) -> None:
    before = Heart(store, 1)
    before._found = "rank 0 has died"
    before.stop()
    heart = Heart(store, 0)
    assert heart.explain("the checkpoint", [0, 1]).startswith("rank 1 has ended its program, after 0 steps, while")
    heart.stop()


def test_nobody_has_died(store: dist.HashStore) -> None:
    hearts = [Heart(store, rank) for rank in range(2)]
    assert hearts[0].explain("the checkpoint", [0, 1]) == (
        "no rank has died, while this rank, 0, was in the checkpoint, after 0 steps; rank 1 in its own computation, "
        "after 0 steps: ranks must do the same within their timeout"
    )
    hearts[1].now = "the checkpoint"
    message = hearts[0].explain("the checkpoint", [0, 1])
    assert message.endswith("; others too: ranks must do the same within their timeout")
    for heart in hearts:
        heart.stop()


def test_the_store_is_gone(store: dist.HashStore) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    heart = Heart(server.clone(), 1)
    del server
    assert heart.explain("the checkpoint", [0, 1]) == (
        "rank 0, or its launcher, which keeps the store, has died or cannot be reached, while this rank, 1, was in the "
        "checkpoint, after 0 steps"
    )
    heart.stop()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (dist.DistNetworkError("broken pipe"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (heartbeat.RankError("gloo/ was to blame"), False),
    ],
)
def test_which_errors_are_of_ranks(error: RuntimeError, expected: bool) -> None:
    assert is_of_ranks(error) is expected


# ---- in running ranks -----------------------------------------------------------------------------------------------


def test_ranks_that_do_not_do_the_same_are_told_so(pool: Pool) -> None:
    found = pool.run(4, fault_jobs.late)
    assert found[0] == (
        "no rank has died, while this rank, 0, was in the checkpoint, after 1 steps; rank 1 in its own computation, "
        "after 1 steps: ranks must do the same within their timeout",
        True,
    )


def test_other_errors_pass_as_they_are(pool: Pool) -> None:
    assert pool.run(2, fault_jobs.other_error) == ["the disk is full"] * 2


def test_a_process_has_one_heart(pool: Pool) -> None:
    assert pool.run(2, fault_jobs.hearts) == [(1, True)] * 2


def test_data_counts_that_differ_are_named_on_all_ranks(pool: Pool) -> None:
    assert (
        pool.run(3, fault_jobs.counts, [17, 17, 16])
        == ["the number of batches differs between ranks: it is 17 on rank 0, 16 on rank 2"] * 3
    )
    assert pool.run(3, fault_jobs.counts, [17, 17, 17]) == ["no error"] * 3
