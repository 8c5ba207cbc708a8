"""How many bytes does a rank hold? Parameters, gradients and state under each strategy, against the formula.

Every rank is a process on the CPU. Some steps warm up; in one more, memory is counted after each tensor operation: the
storages in which parameters, gradients (with the buckets) and the optimizer's state lie, and all that are alive. The
rise of the resident set is a cross-check by the system: it has what the allocator and the connections take, too.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_parallel import STRATEGIES, Blocks
from common import free_memory, machine, markdown, parser, write_json
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytrain.grads import ALIGN_BYTES
from pytrain.optim import AdamW
from pytrain.optim.storage import CODE_BLOCK, CODED_FROM
from pytrain.parallel import Strategy, Zero2
from pytrain.parallel.zero import AHEAD

WARM_UP = 2
MB = 1e6
PARTS = ("parameters", "gradients", "state")
TORCH = ("torch DDP", "torch DDP, ZeroRedundancyOptimizer")


@dataclass(frozen=True)
class Form:
    """How AdamW stores a model: the parameters' dtype, its options, and bytes of its state a parameter."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    state: Callable[[int], int]  # of elements


def coded(numel: int) -> int:
    """Bytes of two states in 8 bits, which small tensors do not have."""
    return 2 * (numel + 4 * -(-numel // CODE_BLOCK)) if numel >= CODED_FROM else 8 * numel


FORMS = [
    Form("fp32", torch.float32, {}, lambda numel: 8 * numel),
    Form("bf16, fp32 masters", torch.bfloat16, {"master_weights": True}, lambda numel: 12 * numel),
    Form("fp32, 8-bit state", torch.float32, {"state_dtype": "8bit"}, coded),
]
CASES = [(strategy, form) for form in FORMS for strategy in STRATEGIES] + [(name, FORMS[0]) for name in TORCH]


@dataclass(frozen=True)
class Size:
    """A model, and of what size its buckets are, in MiB."""

    width: int
    blocks: int
    words: int
    bucket_cap_mb: float

    def make(self) -> Blocks:
        return Blocks(self.width, self.blocks, self.words)


FULL, QUICK = Size(512, 8, 20_000, 25.0), Size(64, 2, 500, 0.1)


@dataclass(frozen=True)
class Bound:
    """What the formula says, in bytes, and how much more there may be."""

    formula: float
    slack: float


# ---- the formula ----------------------------------------------------------------------------------------------------


def bounds(strategy: str, form: Form, numels: list[int], buckets: list[int], ranks: int) -> dict[str, Bound]:
    """The formula for each of PARTS.

    Args:
        numels: of each parameter.
        buckets: the bytes of each.
    """
    item = form.dtype.itemsize
    total, state = item * sum(numels), sum(map(form.state, numels))
    align = 4 * CODE_BLOCK if "state_dtype" in form.options else ALIGN_BYTES
    padding = align * (len(numels) + ranks * len(buckets))  # a gap before each slot, and the end of each bucket
    filling = max(buckets)  # what autograd has put elsewhere, and is copied into one bucket
    counts = 8 * len(numels)
    if strategy not in ("zero1", "zero2"):
        parts = {"parameters": Bound(total, 0), "gradients": Bound(total, padding + filling)}
        return {**parts, "state": Bound(state, counts)}
    # Small tensors, whose states are larger where others' are 8-bit, may all lie on one rank, and so may a block's end.
    uneven = sum(form.state(n) for n in numels if n < CODED_FROM) if align != ALIGN_BYTES else 0
    a_rank = padding / ranks / item * max(form.state(n) / n for n in numels if n)
    whole = Bound(total, padding + filling)
    # Those in flight, one that leaves, and the next one, where gradients come in another order.
    under_way = max(sum(buckets[i : i + AHEAD + 2]) for i in range(len(buckets)))
    sharded = Bound(total / ranks + under_way, padding + filling)
    return {
        "parameters": Bound(total, padding),
        "gradients": whole if strategy == "zero1" else sharded,
        "state": Bound(state / ranks, counts + a_rank + uneven),
    }


# ---- counting -------------------------------------------------------------------------------------------------------


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of the storages in which tensors lie, each once."""
    storages = (t.untyped_storage() for t in tensors if isinstance(t, Tensor))
    return sum({s._cdata: s.nbytes() for s in storages}.values())


class Gauge(TorchDispatchMode):
    """Looks at memory after each tensor operation; made before the model, it knows every storage.

    Attributes:
        most: the most bytes of each part, and of "all", since `begin`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}  # weak pointers to storages, by these pointers' address
        self._parts: dict[str, Callable[[], Iterable[Any]]] | None = None
        self.most: dict[str, int] = {}

    def begin(self, parts: dict[str, Callable[[], Iterable[Any]]]) -> None:
        """Look from now on at what these functions return."""
        self._parts, self.most = parts, dict.fromkeys([*parts, "all"], 0)

    def look(self) -> None:
        """Note what there is now."""
        if self._parts is None:
            return
        for name, tensors in self._parts.items():
            self.most[name] = max(self.most[name], size_of(tensors()))
        total = 0
        for address, weak in list(self._alive.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak)
            if storage is None:
                torch.UntypedStorage._free_weak_ref(weak)
                del self._alive[address]
            else:
                total += storage.nbytes()
        self.most["all"] = max(self.most["all"], total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.layout == torch.strided:
                storage = result.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage._weak_ref()
        self.look()
        return results


class Resident:
    """The rise of the process's resident set from now on, at its highest; None where the system does not tell."""

    def __init__(self) -> None:
        free_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
            self._begin = self._read("VmRSS")
        except OSError:
            self._begin = None

    @staticmethod
    def _read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    def rise(self) -> int | None:
        """In bytes."""
        return None if self._begin is None else self._read("VmHWM") - self._begin


# ---- what is measured -----------------------------------------------------------------------------------------------


def ours(strategy: str, form: Form, size: Size, group: Any) -> tuple[nn.Module, Any, Any]:
    """The model, its optimizer and the strategy."""
    model = size.make().to(form.dtype)
    optimizer = AdamW(model.parameters(), **form.options)
    caps = {"bucket_cap_mb": size.bucket_cap_mb, "first_bucket_mb": size.bucket_cap_mb / 4}
    return model, optimizer, STRATEGIES[strategy](model, optimizer, group=group, **caps)


def theirs(name: str, form: Form, size: Size, group: Any) -> tuple[nn.Module, Any, Any]:
    """The same by torch's parts."""
    model = size.make().to(form.dtype)
    options = {"bucket_cap_mb": size.bucket_cap_mb, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(model, process_group=group, **options)
    optimizer: torch.optim.Optimizer
    if name == TORCH[1]:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # which takes seconds: it compiles TorchScript

        params = model.parameters()
        optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, process_group=group, fused=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return model, optimizer, wrapped


def gradients(model: nn.Module, strategy: Any) -> Iterable[Any]:
    """Where gradients lie."""
    yield from (p.grad for p in model.parameters())
    if isinstance(strategy, Strategy):
        yield from (bucket.flat for bucket in strategy.buckets.buckets)
    if isinstance(strategy, Zero2):
        yield from strategy._kept


def states(optimizer: Any) -> Iterable[Any]:
    """The optimizer's own tensors."""
    local = getattr(optimizer, "optim", optimizer)  # of ZeroRedundancyOptimizer
    return (value for state in local.state.values() for value in state.values())


def measure(group: Any, which: str, form: Form, size: Size) -> dict[str, Any]:
    """A rank's most bytes of each part in a step."""
    torch.manual_seed(0)
    resident = Resident()
    with Gauge() as gauge:
        model, optimizer, strategy = (theirs if which in TORCH else ours)(which, form, size, group)
        for step in range(WARM_UP + 1):
            if step == WARM_UP:
                gauge.begin(
                    {
                        "parameters": model.parameters,
                        "gradients": lambda: gradients(model, strategy),
                        "state": lambda: states(optimizer),
                    }
                )
            if isinstance(strategy, Strategy):
                model().backward()
                strategy.step(max_norm=1.0)
            else:
                strategy().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
                optimizer.step()
            gauge.look()
            optimizer.zero_grad()
    found: dict[str, Any] = {"strategy": which, "form": form.name, "ranks": dist.get_world_size(group)}
    found.update(most=gauge.most, resident=resident.rise(), bounds=None)
    if isinstance(strategy, Strategy):
        numels = [p.numel() for p in model.parameters()]
        buckets = [bucket.flat.numel() * bucket.flat.element_size() for bucket in strategy.buckets.buckets]
        limits = bounds(which, form, numels, buckets, found["ranks"])
        found["bounds"] = {part: asdict(bound) for part, bound in limits.items()}
        strategy.abandon()
    return found


def measure_all(group: Any, size: Size, *names: str) -> list[dict[str, Any]]:
    """A row a case, or a case of these strategies."""
    rows = []
    gc.freeze()  # what was imported: each row's search for garbage would go through that
    for which, form in CASES:
        if which in names or not names:
            dist.barrier(group)
            rows.append(measure(group, which, form, size))
    gc.unfreeze()
    return rows


def most(each: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of the rank that has the most of each part."""
    rows = []
    for ranks in zip(*each, strict=True):
        row = dict(ranks[0])
        row["most"] = {part: max(one["most"][part] for one in ranks) for part in row["most"]}
        if row["resident"] is not None:
            row["resident"] = max(one["resident"] for one in ranks)
        rows.append(row)
    return rows


def beyond(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Which of our rows have more than the formula and its slack, or less than the formula."""
    errors = []
    for row in rows:
        for part, bound in (row["bounds"] or {}).items():
            low, high = bound["formula"], bound["formula"] + bound["slack"]
            if part == "gradients" and row["strategy"] == "zero2":
                low /= 2  # fewer buckets may be under way
            if not low <= row["most"][part] <= high:
                what = f"{row['strategy']}, {row['form']}, {row['ranks']} ranks: {part}"
                errors.append(f"{what} of {row['most'][part]} bytes, expected {low:.0f} to {high:.0f}")
    return errors


def table(rows: Iterable[dict[str, Any]]) -> str:
    """In MB, measured / formula."""
    cells = []
    for row in rows:
        line = [row["strategy"], row["form"], str(row["ranks"])]
        for part in PARTS:
            formula = "" if row["bounds"] is None else f" / {row['bounds'][part]['formula'] / MB:.1f}"
            line.append(f"{row['most'][part] / MB:.1f}{formula}")
        resident = "" if row["resident"] is None else f"{row['resident'] / MB:.0f}"
        cells.append([*line, f"{row['most']['all'] / MB:.0f}", resident])
    return markdown(["strategy", "AdamW", "ranks", *PARTS, "all at once", "resident set"], cells)


def run_rank(rank: int, ranks: int, store: str, size: Size, results: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    each: list[Any] = [None] * ranks
    dist.all_gather_object(each, measure_all(None, size))
    if rank == 0:
        results.put(each)
    dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str]) -> int:
    """Measure; 1 where our strategies have more than the formula says."""
    args = parser(__doc__ or "").parse_args(argv)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rows: list[dict[str, Any]] = []
    for ranks in (2, 4):
        results: Any = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (ranks, str(Path(folder) / "store"), QUICK if args.quick else FULL, results)
            mp.start_processes(run_rank, arguments, nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]
            rows += most(results.get())
    print(f"MB a rank, the most of any rank, measured / formula; {machine()}")
    print(table(rows))
    write_json(args.json, rows)
    errors = beyond(rows)
    print("\n".join(errors) or "all within the formula and its slack")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
