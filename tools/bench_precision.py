"""What accuracy fp16 and int8 files keep, against the figure that they are accepted by.

    python tools/bench_precision.py [--epochs 6] [--out precision.json]

Trains small nets of different kinds on scikit-learn's digits (1,437 to train on, 360 to score),
writes each in fp16 and in both forms of int8, and spoils the int8 ranges by known factors, so that
the outputs' error runs from far below the tolerance to far above it. Prints one line per file:
error, whether ``parity.TOLERANCE`` accepts it, accuracy lost on pictures that nothing saw before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune2deploy.calibration import first
from prune2deploy.exporting import parity, precision, quantize, ranges, simplify
from prune2deploy.exporting.export import to_onnx
from prune2deploy.search import lowering

SIZE = 16
FACTORS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
RECIPES = ("tensorrt", "cpu")
Rows = list[tuple[tuple[Tensor, ...], Tensor]]


def block(given: int, made: int, act: type[nn.Module], groups: int = 1) -> nn.Sequential:
    """Convolution, normalisation, activation."""
    conv = nn.Conv2d(given, made, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(made), act())


class Residual(nn.Module):
    """Identity shortcuts around pairs of convolutions."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.stem = block(1, 24, act)
        self.pairs = nn.ModuleList(
            nn.Sequential(block(24, 24, act), block(24, 24, act)) for _ in range(3)
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify pictures (N, 1, H, W)."""
        x = self.stem(x)
        for pair in self.pairs:
            x = x + pair(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Tokens(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, 32, 4, 4)
        self.place = nn.Parameter(0.1 * torch.randn(1, (SIZE // 4) ** 2, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify pictures (N, 1, H, W)."""
        x = self.cut(x).flatten(2).transpose(1, 2) + self.place
        logits: Tensor = self.head(self.layers(x).mean(1))
        return logits


def plain() -> nn.Module:
    """Convolutions one after the other."""
    body = [block(1, 16, nn.ReLU), block(16, 32, nn.ReLU), nn.MaxPool2d(2), block(32, 32, nn.ReLU)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def depthwise() -> nn.Module:
    """Depthwise and pointwise convolutions in turn, as in MobileNets."""
    body: list[nn.Module] = [block(1, 24, nn.ReLU6)]
    for _ in range(3):
        body += [block(24, 24, nn.ReLU6, groups=24), nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "depthwise": depthwise,
    "residual": lambda: Residual(nn.ReLU),
    "residual-silu": lambda: Residual(nn.SiLU),
    "transformer": Tokens,
}


def digits() -> tuple[Rows, Rows]:
    """Batches to train on and to score on, pictures (N, 1, SIZE, SIZE) in 0..1."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images / 16.0, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(images, (SIZE, SIZE), mode="bilinear")
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[:1437], order[1437:]
    train, test = ([((images[rows],), labels[rows]) for rows in part.split(32)] for part in parts)
    return train, test


def trained(net: nn.Module, train: Rows, epochs: int) -> nn.Module:
    """Fit a net; the same seed gives the same net."""
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    net.train()
    for _ in range(epochs):
        for (pictures,), labels in train:
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(pictures), labels).backward()
            optimiser.step()
    return net.eval()


def files(path: Path, train: Rows) -> Iterator[tuple[str, Path, str]]:
    """Files in lower precision: a name, the file, the precision that it is judged as."""
    out = path.with_name("low.onnx")
    real = list(ranges.feeds(path, first(train, lowering.QUICK_SAMPLES)))
    yield "fp16", precision.to_fp16(path, out, samples=real).path, "fp16"
    for recipe in RECIPES:
        found = precision.to_int8(path, out, train, precision.Int8Options(recipe=recipe))
        yield f"int8 {recipe}, {len(found.kept)} kept", out, "int8"
    seen = ranges.calibrate(path, train)
    for factor in FACTORS:
        spoilt = {n: (factor * low, factor * high) for n, (low, high) in seen.ranges.items()}
        quantize.quantize(path, out, replace(seen, ranges=spoilt), "tensorrt")
        yield f"int8, ranges x {factor:g}", out, "int8"


def lines(
    name: str, folder: Path, data: tuple[Rows, Rows], epochs: int
) -> Iterator[dict[str, Any]]:
    """One line per file of one net."""
    train, test = data
    torch.manual_seed(0)
    net = trained(NETS[name](), train, epochs)
    raw = to_onnx(net, (torch.rand(1, 1, SIZE, SIZE),), folder / "raw.onnx", dynamic_batch=True)
    path = simplify.simplify(raw, folder / "net.onnx").path
    before = lowering.top1(path, test)
    assert before is not None
    samples = list(ranges.feeds(path, first(train, lowering.QUICK_SAMPLES)))
    for kind, file, judged in files(path, train):
        found = parity.compare(
            parity.onnx_runner(path), parity.onnx_runner(file), samples, precision=judged
        )
        after = lowering.top1(file, test)
        assert after is not None
        yield {
            "net": name,
            "file": kind,
            "error": found.error,
            "accepted": found.passed,
            "top1_fp32": before[0],
            "drop": before[0] - after[0],
        }


def main() -> int:
    """Print the table; write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    data, found = digits(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.nets:
            for line in lines(name, Path(folder), data, arguments.epochs):
                found.append(line)
                told = "accepted" if line["accepted"] else "refused"
                print(
                    f"{name:14} {line['file']:24} error {line['error']:7.4f} {told:8} "
                    f"top-1 {line['top1_fp32']:.2%} drops by {100 * line['drop']:5.2f} points",
                    flush=True,
                )
    for told, accepted in (("accepted", True), ("refused", False)):
        drops = [100 * line["drop"] for line in found if line["accepted"] is accepted]
        if drops:
            print(f"{told}: {len(drops)} files, largest drop {max(drops):.2f} points")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
