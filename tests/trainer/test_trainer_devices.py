"""`Trainer(devices=N)` outside a launcher: it runs the program again for each rank, and all end together."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.platform != "linux" or not torch.distributed.is_available():
    pytest.skip("the ranks' processes are tested on Linux", allow_module_level=True)
import rank_cases as cases
from trainer_cases import assert_same_bits, make_trainer, read_metrics

from pytrain.launch import start_ranks
from pytrain.trainer import Trainer, load_checkpoint

HERE = Path(__file__).parent
SCRIPT = HERE / "devices_script.py"
STOPPED = 143


def launch(words: list[str], folder: Path, what: str, devices: str = "2") -> tuple[int, str]:
    """Run a program; return its exit code and what it said. No rank is left."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, *words, str(folder), what, devices],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    pid, late = int((folder / "pid1").read_text()), time.monotonic() + 60
    assert pid != int((folder / "pid0").read_text())
    while Path(f"/proc/{pid}").exists():
        # Only where rank 0 was killed does the other one end after it.
        assert "kill 0" in what and time.monotonic() < late, f"rank 1 is left: {done.stderr}"
        time.sleep(0.05)
    return done.returncode, done.stderr


def results(folder: Path) -> list[Any]:
    found: list[Any] = []
    for number in range(2):
        state = load_checkpoint(folder / f"end{number}.ckpt")
        state["callback_metrics"].pop("seconds", None)
        found += [state, read_metrics(folder / str(number))]
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What torchrun's ranks make."""
    folder = tmp_path_factory.mktemp("torchrun")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    code, said = launch(words, folder, "nothing", "auto")
    assert code == 0, said
    return results(folder)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([str(SCRIPT)], id="script"),
        pytest.param(["-u", "-m", "devices_script"], id="module", marks=pytest.mark.slow),
        pytest.param(["-c", "import devices_script as s; s.main()"], id="command", marks=pytest.mark.slow),
    ],
)
def test_two_fits_of_a_program_are_those_of_torchrun(words: list[str], expected: list[Any], tmp_path: Path) -> None:
    code, said = launch(words, tmp_path, "nothing")
    assert code == 0, said
    assert_same_bits(results(tmp_path), expected)


@pytest.mark.parametrize(
    "what",
    ["error 0", "error 1", "early error 1", pytest.param("late error 1", marks=pytest.mark.slow)],
)
def test_an_error_on_one_rank_ends_both_and_the_program_fails(what: str, tmp_path: Path) -> None:
    code, said = launch([str(SCRIPT)], tmp_path, what)
    assert code == 1 and "KeyError" in said and "did not come to its end" not in said
    if what != "error 0":
        assert "pytrain: rank 1 ended with exit code 1" in said or "RankError" in said


@pytest.mark.parametrize("what", ["kill 1", pytest.param("kill 0", marks=pytest.mark.slow), "early kill 0"])
def test_a_killed_rank_takes_the_other_with_it(what: str, tmp_path: Path) -> None:
    code, _ = launch([str(SCRIPT)], tmp_path, what)
    assert code == (1 if what == "kill 1" else -9)


@pytest.mark.parametrize("what", ["stop 0", pytest.param("stop 1", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_ends_both_with_143(what: str, tmp_path: Path) -> None:
    code, said = launch([str(SCRIPT)], tmp_path, what)
    assert code == STOPPED, said
    assert [(tmp_path / f"code{rank}").read_text() for rank in range(2)] == [str(STOPPED)] * 2
    assert said.count("stopped by a signal at step 2") == 1
    assert [path.name for path in (tmp_path / "0" / "checkpoints").iterdir()] == ["step-00000002.ckpt"]


# ---- where it is refused --------------------------------------------------------------------------------------------


def test_a_session_without_a_program_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(why: str) -> None:
        with pytest.raises(RuntimeError, match=f"devices=2 runs the program again for each rank, and {why}.*torchrun"):
            make_trainer(tmp_path, max_steps=1, devices=2).fit(cases.Regression(), cases.joined(1))
        assert "RANK" not in os.environ

    for patched, name, value in ((sys, "ps1", ">>> "), (sys, "orig_argv", ["python", "-i", "file.py"])):
        with monkeypatch.context() as patch:
            patch.setattr(patched, name, value, raising=False)
            refused("this is an interactive session")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ipykernel", sys)
        refused("this is an interactive session")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "orig_argv", ["python", "-"])
        patch.delattr(sys.modules["__main__"], "__file__", raising=False)  # under xdist there is none
        refused("it came in by the standard input")
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing, "parent_process", lambda: "somebody")
        refused("this is a process that another has started")


def test_several_devices_need_a_strategy_for_several(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="devices=2 are several ranks, strategy='single' is this process alone"):
        make_trainer(tmp_path, max_steps=1, devices=2, strategy="single").fit(cases.Regression(), cases.joined(1))


def test_numbers_that_are_not_the_launchers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="num_nodes=2 needs a launcher on every node: torchrun --nnodes 2"):
        Trainer(max_steps=1, num_nodes=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for devices, nodes in ((2, 1), (4, 2), (1, 1)):
        with pytest.raises(
            ValueError, match=f"devices={devices} on num_nodes={nodes}, but the launcher has started 4 ranks"
        ):
            Trainer(max_steps=1, devices=devices, num_nodes=nodes)
    for devices, nodes in ((2, 2), (4, 1)):
        assert Trainer(max_steps=1, devices=devices, num_nodes=nodes).config.devices == devices
    start_ranks(4, "auto")  # under a launcher it does nothing
    assert os.environ["WORLD_SIZE"] == "4" and "LOCAL_RANK" not in os.environ
