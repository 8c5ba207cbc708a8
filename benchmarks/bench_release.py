"""How much memory does gradient release save? Peak memory of a training with step_in_backward and without.

Each way runs in a process of its own, whose peak is what the kernel says of its resident memory, less what it was
before the model was made.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import machine, markdown, parser, write_json
from torch import Tensor, nn

from pytrain.optim import AdamW

LAYERS, WIDTH, STEPS = 24, 2048, 3
QUICK = 8, 512
MIB = 2**20


def resident_peak() -> int:
    """Bytes. Linux starts ru_maxrss with the parent process's, but tells the own one in /proc; macOS counts bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].removesuffix("kB"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def train(layers: int, width: int, release: bool) -> dict[str, Any]:
    """Take some steps; the peak in bytes, and the last loss, which must not depend on the way."""
    torch.manual_seed(0)
    inputs = torch.randn(8, width)
    run(nn.Sequential(nn.Linear(width, 8)), inputs, release)  # what torch loads and keeps for its first steps
    before = resident_peak()
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    loss = run(model, inputs, release)
    parameters = sum(p.numel() for p in model.parameters())
    return {"peak": resident_peak() - before, "parameters": parameters, "loss": loss}


def run(model: nn.Module, inputs: Tensor, release: bool) -> float:
    """The last loss of some steps."""
    optimizer = AdamW(model.parameters(), lr=1e-4, step_in_backward=release)
    for _ in range(STEPS):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def measure(layers: int, width: int, release: bool, threads: int) -> dict[str, Any]:
    """`train` in a process of its own."""
    code = (
        f"import json, torch, bench_release; torch.set_num_threads({threads}); "
        f"print(json.dumps(bench_release.train({layers}, {width}, {release})))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(argv: list[str]) -> int:
    """Run the benchmark; 0, or 1 with a traceback where the two ways do not agree."""
    args = parser(__doc__ or "").parse_args(argv)
    layers, width = QUICK if args.quick else (LAYERS, WIDTH)
    rows = []
    for name, release in (("all gradients, then step", False), ("step_in_backward", True)):
        rows.append({"way": name, **measure(layers, width, release, args.threads)})
    if rows[0]["loss"] != rows[1]["loss"]:
        raise AssertionError(f"the losses differ: {rows[0]['loss']} and {rows[1]['loss']}")
    cells = [[r["way"], f"{r['peak'] / MIB:.0f}", f"{r['peak'] / r['parameters']:.1f}"] for r in rows]
    print(f"AdamW, fp32, {rows[0]['parameters']:,} parameters in {layers} layers, {STEPS} steps: the losses agree\n")
    print(markdown(["way", "peak, MiB", "bytes a parameter"], cells))
    write_json(args.json, [{"machine": machine(), **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
