"""One line in somebody else's training loop: Lightning, the Hugging Face Trainer, and a loop of one's own.

Each runs three times: with torch's optimizer in fp64 (the truth), with torch's in fp32, and with that one fused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import error, largest, needs_kernels
from torch import Tensor
from torch.optim import lr_scheduler

from pytrain.optim import FusedOptimizer
from pytrain.optim.fuse import fuse

STEPS, BATCH = 12, 4
Made = tuple[torch.optim.Optimizer, Any]
Make = Callable[[Any], Made]
Host = Callable[[torch.dtype, Make], tuple[list[Tensor], Any]]


def need(*names: str) -> list[Any]:
    """The modules, or a skip that says which of them is not installed."""
    return [pytest.importorskip(name, reason=f"needs {name}, of the `test` requirements") for name in names]


# Gradients that are zero but for rounding (attention's key bias has them) would be blown up by a smaller eps.
OPTIONS: dict[str, Any] = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}


def by_torch(params: Any) -> Made:
    """What a user's code has: an optimizer of torch and a scheduler."""
    optimizer = torch.optim.AdamW(params, **OPTIONS)
    return optimizer, lr_scheduler.LinearLR(optimizer, 0.2, total_iters=STEPS)


def by_ours(params: Any) -> Made:
    """The same after one line."""
    optimizer = fuse(torch.optim.AdamW(params, **OPTIONS))
    return optimizer, lr_scheduler.LinearLR(optimizer, 0.2, total_iters=STEPS)


def compare(host: Host) -> None:
    """The fused run is as exact as torch's, and what stepped it were the kernels.

    Its error may be twice torch's own, and at least what two units in the last place a step make of each parameter.
    """
    (exact, _), (theirs, _) = host(torch.float64, by_torch), host(torch.float32, by_torch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        mine, optimizer = host(torch.float32, by_ours)
    counts = {event.key: event.count for event in seen.key_averages()}
    kernels = {name: count for name, count in counts.items() if name.startswith("pytrain::") and "step" in name}
    assert isinstance(optimizer, FusedOptimizer) and optimizer.backend == "native"
    assert counts["Optimizer.step#AdamW.step"] == STEPS and sum(kernels.values()) >= STEPS
    assert all(optimizer.state[p]["step"] == STEPS for group in optimizer.param_groups for p in group["params"])
    rounding = 2 * STEPS * torch.finfo(torch.float32).eps * largest(exact)
    assert error(mine, exact) <= max(2 * error(theirs, exact), rounding)


def network(dtype: torch.dtype) -> torch.nn.Sequential:
    """The same small model every time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)


def data(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Examples and their classes."""
    x = torch.randn(STEPS * BATCH, 6, generator=torch.Generator().manual_seed(1))
    return [(row.to(dtype), row[:3].argmax()) for row in x]


@needs_kernels
def test_a_plain_loop() -> None:
    def loop(dtype: torch.dtype, make: Make) -> tuple[list[Tensor], Any]:
        model = network(dtype)
        optimizer, plan = make(model.parameters())
        for x, y in torch.utils.data.DataLoader(data(dtype), batch_size=BATCH):  # type: ignore[arg-type]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            plan.step()
        return list(model.parameters()), optimizer

    compare(loop)


@needs_kernels
@pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning.*")
def test_a_lightning_module(tmp_path: Path) -> None:
    (lightning,) = need("pytorch_lightning")  # the package `lightning` brings it along

    def fit(dtype: torch.dtype, make: Make) -> tuple[list[Tensor], Any]:
        class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.model = network(dtype)

            def training_step(self, batch: Any, _: int) -> Tensor:
                x, y = batch
                return torch.nn.functional.cross_entropy(self.model(x), y)

            def configure_optimizers(self) -> Any:
                optimizer, plan = make(self.parameters())
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}

        quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(data(dtype), batch_size=BATCH))  # type: ignore[arg-type]
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == STEPS
        return list(module.parameters()), trainer.optimizers[0]

    compare(fit)


@needs_kernels
def test_the_hugging_face_trainer(tmp_path: Path) -> None:
    transformers, _ = need("transformers", "accelerate")

    def train(dtype: torch.dtype, make: Make) -> tuple[list[Tensor], Any]:
        transformers.set_seed(0)
        no = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
        config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, **no)
        model = transformers.GPT2LMHeadModel(config).to(dtype)
        tokens = torch.randint(32, (STEPS * BATCH, 8), generator=torch.Generator().manual_seed(2))
        optimizer, plan = make(model.parameters())
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            optimizers=(optimizer, plan),
        )
        trainer.train()
        assert plan.last_epoch == STEPS and trainer.optimizer.optimizer is optimizer  # the outer one is accelerate's
        if isinstance(optimizer, FusedOptimizer):
            with pytest.raises(TypeError, match="AcceleratedOptimizer; fuse an optimizer before a host wraps it"):
                fuse(trainer.optimizer)
        return list(model.parameters()), optimizer

    compare(train)
