"""The demo's data: scikit-learn's digits, the standard library's source text, and image sets in IDX files."""

from __future__ import annotations

import gzip
import struct
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IDX_MAX_BYTES = 1 << 30
SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))
_CODES = bytes(SYMBOLS.index(chr(code)) if chr(code) in SYMBOLS else SYMBOLS.index("?") for code in range(256))


class DemoError(Exception):
    """What keeps the demo from running, as one line for the user."""


@dataclass(frozen=True)
class Split:
    """Inputs and targets, for training and held out; the first dimension counts examples."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@dataclass(frozen=True)
class Batches:
    """A loader over tensors in memory whose order is fixed beforehand, so that every run sees the same batches.

    Shape: inputs and targets (examples, ...); order (steps, batch size), int64.
    """

    inputs: Tensor
    targets: Tensor
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.order:
            yield self.inputs[rows], self.targets[rows]

    def part(self, rank: int, size: int) -> Batches:
        """Return a loader of the rank's part of each batch; `size` parts are the whole."""
        return replace(self, order=self.order[:, rank::size])


def shuffled(count: int, *, batch: int, steps: int, seed: int) -> Tensor:
    """Return an order for Batches: shuffled passes over `count` examples, one after the other.

    Args:
        count: examples, at least `batch`.
        batch: examples in a batch, >= 1.
        steps: batches, >= 1.
        seed: of the shuffling; the global random state is left alone.

    Shape: returns (steps, batch), int64, each value in [0, count).
    """
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * batch // count)
    rows = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return rows[: steps * batch].view(steps, batch)


def load_digits() -> Split:
    """Return scikit-learn's 1,797 scanned digits, every fifth one held out.

    Shape: inputs (n, 8, 8), uint8, 0 to 16; targets (n,), int64, 0 to 9.

    Raises:
        DemoError: scikit-learn is not installed.
    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise missing_extra("scikit-learn", error) from error
    digits = bundled()
    inputs = torch.from_numpy(digits.images).to(torch.uint8)
    targets = torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(inputs)) % 5 == 4
    return Split(inputs[~held_out], targets[~held_out], inputs[held_out], targets[held_out])


def missing_extra(package: str, error: ImportError) -> DemoError:
    """Return the error for a package that the demo needs and that does not import."""
    return DemoError(f"the demo needs {package} ({error}): pip install pytrain[demo]")


def load_text(*, context: int, folder: Path | None = None, max_chars: int = 3_000_000, windows: int = 256) -> Split:
    """Return source text as overlapping windows of symbols and, as targets, the symbols that follow.

    Takes the folder's own .py files in the order of their names until there are `max_chars`. Whether a file is held
    out, as about one in ten is, follows from its name alone: a file more or less, as distributions of Python have
    them, leaves all others where they were. Tabs become spaces, and what is not printable ASCII becomes "?".

    Args:
        context: symbols in a window, >= 1.
        folder: where the files are; None is the standard library of this Python.
        max_chars: about how much to read at most, >= 1.
        windows: how many held-out windows to keep at most, spread evenly, >= 1.

    Shape: inputs and targets (windows, context), int64, indices into SYMBOLS.

    Raises:
        DemoError: the folder has too little text in .py files.
    """
    source = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    train: list[str] = []
    test: list[str] = []
    read = 0
    for path in sorted(source.glob("*.py"), key=lambda path: path.name):
        if read >= max_chars:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        read += len(text)
        (test if zlib.crc32(path.name.encode()) % 10 == 0 else train).append(text)
    parts = [encode("".join(texts)) for texts in (train, test)]
    if any(len(part) <= context for part in parts):
        raise DemoError(
            f"folder {source}: expected .py files with more than {context} characters each to train on and to hold "
            f"out, got {len(parts[0])} and {len(parts[1])} characters"
        )
    (train_inputs, train_targets), (test_inputs, test_targets) = (
        (part[:-1].unfold(0, context, stride), part[1:].unfold(0, context, stride))
        for part, stride in zip(parts, (1, context), strict=True)
    )
    keep = torch.linspace(0, len(test_inputs) - 1, min(windows, len(test_inputs))).long()
    return Split(train_inputs, train_targets, test_inputs[keep], test_targets[keep])


def encode(text: str) -> Tensor:
    """Return the text as indices into SYMBOLS, shape (characters,), int64."""
    codes = text.expandtabs(4).encode("ascii", "replace").translate(_CODES)
    return torch.frombuffer(bytearray(codes), dtype=torch.uint8).long() if codes else torch.empty(0, dtype=torch.int64)


def decode(indices: Tensor) -> str:
    """Return the text of indices into SYMBOLS; the inverse of `encode` for text of SYMBOLS."""
    return "".join(SYMBOLS[index] for index in indices.tolist())


def find_fashion(data_dir: Path | None) -> Path | None:
    """Return the folder of the Fashion-MNIST files: the given one, else Debian's where it is installed, else None."""
    if data_dir is not None:
        return data_dir
    return FASHION_FOLDER if FASHION_FOLDER.is_dir() else None


def load_idx_images(folder: Path) -> Split:
    """Return a set of labelled images from MNIST's four files, each as it is or gzipped (with .gz in its name).

    Shape: inputs (n, height, width), uint8; targets (n,), int64, 0 to 9.

    Raises:
        DemoError: a file is missing, damaged, or does not fit the others.
    Source: LeCun et al., the MNIST database, file formats; Xiao et al. 2017 (arXiv:1708.07747).
    """
    paths = [_idx_path(folder, name) for name in IDX_FILES]
    train_inputs, train_targets, test_inputs, test_targets = (
        read_idx(path, dimensions=3 if "images" in path.name else 1) for path in paths
    )
    for path, images, labels in ((paths[1], train_inputs, train_targets), (paths[3], test_inputs, test_targets)):
        if len(images) != len(labels) or len(images) == 0:
            raise DemoError(
                f"{path}: expected one label for each of the {len(images)} images, got {len(labels)} labels"
            )
        if int(labels.max()) > 9:
            raise DemoError(f"{path}: expected labels 0 to 9, got {int(labels.max())}")
    if train_inputs.shape[1:] != (28, 28) or test_inputs.shape[1:] != (28, 28):
        sizes = [tuple(images.shape[1:]) for images in (train_inputs, test_inputs)]
        raise DemoError(
            f"{folder}: expected images of 28 x 28 pixels, got {sizes[0]} for training and {sizes[1]} held out"
        )
    return Split(train_inputs, train_targets.long(), test_inputs, test_targets.long())


def _idx_path(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DemoError(f"{folder}: expected the file {name} or {name}.gz, found neither")


def read_idx(path: Path, *, dimensions: int) -> Tensor:
    """Return the bytes of one IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
        path: the file.
        dimensions: how many the file must have, 1 to 4.

    Shape: as the file says, uint8.

    Raises:
        DemoError: it cannot be read, is not such a file, or is longer or shorter than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            expected = bytes((0, 0, 8, dimensions))
            if header[:4] != expected:
                raise DemoError(
                    f"{path}: expected an IDX file that starts with {expected.hex()}, got {header[:4].hex()!r}"
                )
            if len(header) < 4 + 4 * dimensions:
                raise DemoError(f"{path}: expected a header of {4 + 4 * dimensions} bytes, got {len(header)}")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = 1
            for length in shape:
                size *= length
            if size > IDX_MAX_BYTES:
                raise DemoError(f"{path}: expected at most {IDX_MAX_BYTES} bytes of data, the header says {shape}")
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DemoError(f"{path}: cannot be read: {error}") from error
    if len(content) != size:
        got = "more" if len(content) > size else f"{len(content)}"
        raise DemoError(f"{path}: expected {size} bytes after the header (shape {shape}), got {got}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape) if size else torch.empty(shape).byte()
