"""How close to a copy's bandwidth are buckets? Gradients into them, casts of them and their statistics, on the CPU.

The yardstick is torch's `copy_` of one flat tensor, in turns with the others. Bytes are those that must be read and
written: a gradient that is all of its bucket is not copied, and counts for nothing. A cast is there and back, as with
`reduce_dtype=torch.bfloat16`; statistics are pass 1 of a step (inf or nan, and the sum of squares).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Timing, interleaved, machine, markdown, nothing, parser, write_json
from contestants import Case, gpt2
from torch import Tensor
from torch.nn import Parameter

from pytrain import multi
from pytrain.control import CONTROL_HEAD, CONTROL_ROW, SUMSQ
from pytrain.grads import GradBuckets
from pytrain.optim import SGD

FULL, QUICK = Case("GPT-2 small", gpt2()), Case("tiny GPT-2", gpt2(8, 2))
LOW = torch.bfloat16
TARGET = 0.9
YARDSTICK, ALL = "copy_ of one tensor", "copy, cast and statistics"
THREADS = (1, 2)


@dataclass(frozen=True)
class Row:
    """What is timed, and the bytes that it reads and writes."""

    bytes: int
    run: Callable[[], None]


class Gradients:
    """Gradients of a model, as autograd leaves them, and what becomes of them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.params = [Parameter(torch.zeros(shape)) for shape in case.shapes]
        self.sources = [torch.randn(shape) for shape in case.shapes]
        self.buckets = GradBuckets(self.params, lambda bucket: None)
        self.optimizer = SGD(self.params)
        self.lows: list[Tensor] = []
        self.copy()  # once: then gradients that are a bucket are it
        addresses = {b.flat.data_ptr() for b in self.buckets.buckets}
        copied = [g.numel() for g in self.sources if g.data_ptr() not in addresses]
        self.copied, self.total = sum(copied), sum(b.flat.numel() for b in self.buckets.buckets)
        self.flat, self.to = torch.randn(self.copied), torch.zeros(self.copied)
        self.low_views = [torch.zeros(shape, dtype=LOW) for shape in case.shapes]

    def rows(self) -> dict[str, Row]:
        """What is timed, the yardstick first."""
        copy, cast, statistics = 8 * self.copied, 12 * self.total, 4 * sum(g.numel() for g in self.sources)
        return {
            YARDSTICK: Row(copy, self.copy_flat),
            "gradients to buckets": Row(copy, self.copy),
            "buckets to bf16 and back": Row(cast, self.cast),
            "statistics": Row(statistics, self.statistics),
            ALL: Row(copy + cast + statistics, self.all),
            "gradients to bf16, multi.copy_": Row(6 * sum(g.numel() for g in self.sources), self.copy_low),
        }

    def copy_flat(self) -> None:
        """As many bytes in one tensor."""
        self.to.copy_(self.flat)

    def copy(self) -> None:
        """As autograd's hooks do it, the last parameter first."""
        for p, g in zip(reversed(self.params), reversed(self.sources), strict=True):
            p.grad = g
            self.buckets._arrive(p)
        self.buckets.finish()

    def cast(self) -> None:
        """As strategies do it around a sum in another dtype."""
        for bucket in self.buckets.buckets:
            low = bucket.flat.to(LOW)
            bucket.flat.copy_(low)

    def statistics(self) -> None:
        """Pass 1 of a step."""
        self.control = self.optimizer.measure(1.0, 0.0, {}, 0.0)

    def all(self) -> None:
        """What happens to gradients before pass 2 of a step."""
        self.copy()
        self.cast()
        self.statistics()

    def copy_low(self) -> None:
        """Copy and cast in one pass."""
        multi.copy_(self.low_views, self.sources)

    def check(self) -> None:
        """All of it does what it is timed for."""
        wanted = [g.clone() for g in self.sources]
        self.copy()
        assert all(torch.equal(p.grad, g) for p, g in zip(self.params, wanted, strict=True)), "copy: gradients differ"
        self.statistics()
        found = self.control[CONTROL_HEAD:].view(-1, CONTROL_ROW)[0, SUMSQ].item()
        squares = sum(g.double().square().sum().item() for g in wanted)
        assert abs(found - squares) <= 1e-6 * squares, f"statistics: a sum of squares of {found}, expected {squares}"
        self.cast()
        low = [g.to(LOW) for g in wanted]
        assert all(torch.equal(p.grad, g.float()) for p, g in zip(self.params, low, strict=True)), "cast: values differ"
        for g, value in zip(self.sources, wanted, strict=True):  # what is a bucket has been cast
            g.copy_(value)
        self.copy_low()
        assert all(torch.equal(a, b) for a, b in zip(self.low_views, low, strict=True)), "multi.copy_: values differ"


def main(argv: list[str]) -> int:
    """Run the benchmark; an error where results are wrong."""
    options = parser(__doc__ or "")
    options.add_argument("--budget", type=float, default=20.0, help="seconds a number of threads (%(default)s)")
    args = options.parse_args(argv)
    before = torch.get_num_threads()
    gradients = Gradients(QUICK if args.quick else FULL)
    gradients.check()
    rows, cells, lines = gradients.rows(), [], []
    for threads in THREADS:
        torch.set_num_threads(threads)
        repeat, budget = (3, 1.0) if args.quick else (args.repeat, args.budget)
        timings = interleaved({name: (nothing, row.run) for name, row in rows.items()}, repeat=repeat, budget=budget)
        for name, row in rows.items():
            share = speed(row, timings[name]) / speed(rows[YARDSTICK], timings[YARDSTICK])
            target = TARGET if name == ALL else None
            met = "" if target is None else f"{target:g} {'yes' if share >= target else 'NO'}"
            rate = f"{speed(row, timings[name]) / 1e9:.1f}"
            cells.append(
                [name, str(threads), f"{row.bytes / 1e6:.1f}", timings[name].text(), rate, f"{share:.2f}", met]
            )
            lines.append({"machine": machine(), "what": name, "threads": threads, "share": share, "target": target})
    torch.set_num_threads(before)
    print(
        f"results are right; {len(gradients.params)} gradients in {len(gradients.buckets.buckets)} buckets; {machine()}"
    )
    print(markdown(["what", "threads", "MB", "ms", "GB/s", "share of the copy's", "target"], cells))
    write_json(args.json, lines)
    return 0


def speed(row: Row, timing: Timing) -> float:
    """Bytes a second."""
    return row.bytes / timing.median


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
