"""The trainer killed or stopped at 50 random moments: each run that goes on ends as the undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("signals and process starts are tested on Linux", allow_module_level=True)
import kill_cases
from kill_cases import STAGES, Moment, processes
from trainer_cases import assert_same_bits, read_metrics

from pytrain.trainer import load_checkpoint

MOMENTS = 50
SAMPLE = 6  # of them, in a run without the slow tests
STOPPED = 143


def run(folder: Path, asynchronous: bool, moment: Moment | None) -> int:
    """Train in a process; return its exit code."""
    folder.mkdir(exist_ok=True)
    process = processes.Process(target=kill_cases.train, args=(folder, asynchronous, moment))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{moment} did not end: {(folder / 'said.txt').read_text()}")
    return process.exitcode


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """All that the run's end is made of, but for how many seconds it took."""
    state = load_checkpoint(folder / "end.ckpt")
    state["callback_metrics"].pop("seconds", None)
    return state, read_metrics(folder), files(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["in the foreground", "in the background"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The undisturbed run, and how often it comes by each stage."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, request.param, None) == 0, (folder / "said.txt").read_text()
    counts = json.loads((folder / "counts.json").read_text())
    assert all(counts[stage] > 20 for stage in STAGES), counts
    found = result(folder)
    assert found[0]["global_step"] == 6 and found[0]["skipped_steps"] == 3
    assert found[0]["module"]["epochs_ended"] == 3 and found[0]["callbacks"]["Validations"]["count"] == 6
    return request.param, counts, found


def check(folder: Path, moment: Moment, code: int) -> None:
    """How the process has ended, and what it has left and said."""
    if moment.signal == signal.SIGKILL:
        assert code == -signal.SIGKILL
        return
    if code == -signal.SIGTERM:  # it came when the run was done, and ends the program after it
        assert "step-00000006.ckpt" in files(folder)
        return
    said = (folder / "said.txt").read_text().splitlines()[-1]
    assert code == STOPPED, said
    step = int(said.split("at step ")[1].split(";")[0])
    assert f"stopped by a signal at step {step}; ckpt_path='last' goes on" in said
    assert step == 0 or f"step-{step:08d}.ckpt" in files(folder)
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    "seed", [pytest.param(i, marks=() if i < SAMPLE // 2 else pytest.mark.slow) for i in range(MOMENTS // 2)]
)
def test_a_run_stopped_at_any_moment_ends_as_the_undisturbed_one(seed: int, whole: Any, tmp_path: Path) -> None:
    asynchronous, counts, expected = whole
    draw = random.Random(100 * seed + asynchronous)
    ends = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        stage = STAGES[seed % 4] if not ends else draw.choice(STAGES)
        moment = Moment([signal.SIGKILL, signal.SIGTERM][(seed + seed // 4) % 2], stage, draw.randint(1, counts[stage]))
        ends.append(run(tmp_path, asynchronous, moment))
        if ends[-1] == 0:
            break  # what was left of the run was too short
        check(tmp_path, moment, ends[-1])
    if ends[-1] != 0:
        assert run(tmp_path, asynchronous, None) == 0, (tmp_path / "said.txt").read_text()
    assert len(ends) > 1 or ends[0] != 0
    state, lines, names = result(tmp_path)
    assert lines == expected[1]
    assert_same_bits(state, expected[0])
    assert names == expected[2]
