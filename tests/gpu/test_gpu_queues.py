"""The GPU's queues: graphs, streams, several devices, and the sanitizers of the CUDA toolkit."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from gpu_cases import (
    DEVICE,
    HAS_CUDA,
    STEPS,
    Case,
    another_stream,
    captured,
    give_gradients,
    needs_cuda,
    needs_launches,
    parameters,
    run_script,
)
from optim_cases import same_bits
from step_cases import everything
from torch import Tensor

import pytrain
from pytrain.amp import LossScaler
from pytrain.optim import REGISTRY, AdamW

pytestmark = needs_launches
KERNELS = sorted(name for name, cls in REGISTRY.items() if cls.takes_control)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_captured_step_replays_as_steps(name: str) -> None:
    results = []
    for capture in (False, True):
        params = parameters()
        optimizer, scaler = Case(name).make(params), LossScaler(init_scale=8.0)
        give_gradients(params, 0, 8.0)

        def body(optimizer: torch.optim.Optimizer = optimizer, scaler: LossScaler = scaler) -> None:
            pytrain.step(optimizer, scaler, max_norm=1.0)

        if capture:
            again = captured(body)
        else:
            body()
            again = body
        for step in range(STEPS):
            give_gradients(params, step, 8.0)
            again()
        results.append(everything(optimizer))
    assert same_bits(*results)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_a_graph_and_steps_with_gradients_elsewhere_take_turns(name: str, checked: bool) -> None:
    """As steps alone, to the bit; also the first step after the capture, which no replay has gone before."""
    results = []
    for capture in (False, True):
        params, lr = parameters(), torch.tensor(1e-3, device=DEVICE)
        optimizer, scaler = Case(name).make(params), LossScaler(init_scale=8.0)
        optimizer.param_groups[0]["lr"] = lr
        places = [[torch.zeros_like(p) for p in params] for _ in range(2)]

        def step(
            place: int,
            params: list[Tensor] = params,
            optimizer: torch.optim.Optimizer = optimizer,
            scaler: LossScaler = scaler,
            places: list[list[Tensor]] = places,
        ) -> None:
            for p, g in zip(params, places[place], strict=True):
                p.grad = g
            if checked:
                pytrain.step(optimizer, scaler, max_norm=1.0)
            else:
                optimizer.step()

        def body(step: Callable[[int], None] = step) -> None:
            step(0)

        if capture:
            again = captured(body)
        else:
            body()
            again = body
        for i in range(STEPS):
            lr.fill_(1e-3 / (i + 1))
            for place, act in ((1, step), (0, lambda _, again=again: again())):
                for p, g in zip(params, places[place], strict=True):
                    p.grad = g
                give_gradients(params, 2 * i + place, 8.0)
                act(place)
        results.append(everything(optimizer))
    assert same_bits(*results)


def test_a_captured_step_skips_bad_gradients_and_goes_on() -> None:
    params = parameters()
    optimizer, scaler = AdamW(params), LossScaler(init_scale=8.0)
    give_gradients(params, 0, 8.0)
    again = captured(lambda: pytrain.step(optimizer, scaler, max_norm=1.0))
    again()
    before = [x.clone() for x in everything(optimizer)]
    assert params[-1].grad is not None
    params[-1].grad.fill_(float("inf"))
    again()
    assert same_bits(everything(optimizer), before)
    give_gradients(params, 1, 4.0)
    again()
    assert not same_bits(everything(optimizer), before)


def test_a_tensor_lr_is_read_when_a_graph_replays() -> None:
    params = parameters()
    lr = torch.tensor(1e-3, device=DEVICE)
    optimizer = AdamW(params, lr=lr, weight_decay=0.0)
    give_gradients(params, 0)
    again = captured(optimizer.step)
    lr.zero_()
    before = [p.detach().clone() for p in params]
    again()
    assert same_bits([p.detach() for p in params], before)
    lr.fill_(1e-3)
    again()
    assert not same_bits([p.detach() for p in params], before)


def test_optimizers_on_streams_of_their_own_do_not_disturb_each_other() -> None:
    cases = [Case("adamw"), Case("lamb"), Case("sgd", {"momentum": 0.9}), Case("adamw", {}, torch.bfloat16)]
    alone = [case.results(DEVICE) for case in cases]
    params = [parameters(DEVICE, case.dtype) for case in cases]
    optimizers = [case.make(of) for case, of in zip(cases, params, strict=True)]
    for step in range(STEPS):
        for of in params:
            give_gradients(of, step)
        for optimizer in optimizers:
            with another_stream():
                optimizer.step()
    for optimizer, expected in zip(optimizers, alone, strict=True):
        assert same_bits([x.cpu() for x in everything(optimizer)], expected)


def test_memory_that_a_stream_frees_is_not_taken_too_early() -> None:
    """A table that goes with its optimizer while its launches are still queued."""
    expected = Case("adamw").results(DEVICE)
    kept: list[list[Tensor]] = []
    for _ in range(10):
        params = parameters()
        optimizer = Case("adamw").make(params)
        for step in range(STEPS):
            give_gradients(params, step)
            with another_stream():
                optimizer.step()
        kept.append(params)
        del optimizer
    assert all(same_bits([p.detach().cpu() for p in params], expected[: len(params)]) for params in kept)


def two_devices() -> list[str]:
    """Two GPUs, a GPU and the CPU, or the CPU twice."""
    if torch.cuda.device_count() > 1:
        return ["cuda:0", "cuda:1"]
    return ["cuda:0", "cpu"] if HAS_CUDA else ["cpu", "cpu"]


@pytest.mark.parametrize("checked", [False, True])
def test_one_optimizer_over_two_devices(checked: bool) -> None:
    devices = two_devices()
    expected, there = parameters(), parameters()
    params = [torch.nn.Parameter(p.detach().to(devices[i % 2])) for i, p in enumerate(there)]
    together, apart = AdamW(params), AdamW(expected)
    for step in range(STEPS):
        give_gradients(params, step)
        give_gradients(expected, step)
        if checked:
            pytrain.step(together)
            pytrain.step(apart)
        else:
            together.step()
            apart.step()
    assert same_bits([p.detach().cpu() for p in params], [p.detach().cpu() for p in expected])


def test_the_script_for_the_sanitizer_runs() -> None:
    assert run_script("gpu_script.py") == "done\n"


@needs_cuda
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_of_the_toolkit_finds_nothing(tool: str) -> None:
    found = shutil.which("compute-sanitizer")
    if found is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit on PATH")
    run_script("gpu_script.py", under=[found, "--tool", tool, "--error-exitcode", "9"])
