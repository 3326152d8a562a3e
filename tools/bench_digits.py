"""The contest of the budget benchmark: a small ResNet on distorted digits, and who prunes it.

In: a seed. Out: a trained network with its data, and for every method a function from a wanted
latency to a pruned network. Torch-Pruning is called as its README shows, without help; both it and
we take the first-order Taylor criterion from the same samples.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_yard import Trial, Yard, bisect, correct
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from prune2deploy.calibration import from_dataset
from prune2deploy.calibration.batches import Batches
from prune2deploy.importance import score
from prune2deploy.plan import sensitivity
from prune2deploy.plan.allocate import channels
from prune2deploy.plan.choices import choices, importance_curves, trained_curves
from prune2deploy.recover import (
    FinetuneOptions,
    Training,
    evaluate,
    finetune,
    reestimate_batchnorm,
)
from prune2deploy.recover.reconstruct import restore
from prune2deploy.search.worth import TIE, blended
from prune2deploy.surgery.slicing import apply

SIDE, WIDTHS, BLOCKS = 16, (64, 128), (2, 2)
TRAIN, FEW, DRAWS = 800, 512, 5
ORDERS = 3  # fine-tunings of each network, which differ in the order of their samples
EXAMPLE = (torch.zeros(1, 1, SIDE, SIDE),)
PEERS = ("tp uniform", "tp uniform round_to", "tp global", "tp global round_to")
PLAIN, TRAINED, SCORES = "ours", "ours, training follows", "ours, scores only"
OURS = (PLAIN, TRAINED, SCORES)
METHODS = (PLAIN, SCORES, *PEERS)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, before: int, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.short = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, side, side) to (batch, width, side / stride, side / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


class DigitNet(nn.Module):
    """A stem that halves the picture, and two stages of two blocks."""

    def __init__(self, inner: Mapping[int, int] | None = None) -> None:
        """``inner`` gives the inner width of blocks where it differs from the stage's."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        blocks: list[Block] = []
        before = WIDTHS[0]
        for stage, (width, number) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
            for place in range(number):
                stride = 2 if stage and not place else 1
                middle = (inner or {}).get(len(blocks), width)
                blocks.append(Block(before, middle, width, stride))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 16, 16) to (batch, 10)."""
        features: Tensor = self.blocks(self.stem(x))
        scores: Tensor = self.head(features.mean((2, 3)))
        return scores


@dataclass(frozen=True, eq=False)
class Case:
    """A trained network with its data."""

    module: nn.Module
    train: Batches
    test: Batches
    few: Batches
    seed: int
    top1: float

    @cached_property
    def teacher(self) -> nn.Module:
        """The network, which looks up what it says of the samples to train on."""
        return Remembering(self.module, self.train)


class Remembering(nn.Module):
    """Outputs of a network for samples that it has seen; it knows of no others."""

    def __init__(self, module: nn.Module, batches: Batches) -> None:
        super().__init__()
        with torch.no_grad():
            said = [(inputs[0], module(*inputs)) for inputs, _ in batches]
        self.said = {
            one.numpy().tobytes(): out for x, y in said for one, out in zip(x, y, strict=True)
        }

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 16, 16) to (batch, 10)."""
        return torch.stack([self.said[one.numpy().tobytes()] for one in x])


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Digits at 16x16, each turned, moved, scaled and covered with noise.

    Returns:
        800 to train on, and the other 997 to test with, each of these in five distortions.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    dice = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(raw.images), generator=dice)
    pictures = torch.tensor(raw.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(np.asarray(raw.target), dtype=torch.int64)[order]
    learn = TensorDataset(distorted(pictures[:TRAIN], dice), labels[:TRAIN])
    draws = [distorted(pictures[TRAIN:], dice) for _ in range(DRAWS)]
    return learn, TensorDataset(torch.cat(draws), labels[TRAIN:].repeat(DRAWS))


def distorted(pictures: Tensor, dice: torch.Generator) -> Tensor:
    """(n, 1, side, side) in 0..1 to (n, 1, 16, 16)."""
    draw = torch.rand(len(pictures), 4, generator=dice) * 2 - 1
    angle, scale = 0.35 * draw[:, 0], 1 + 0.15 * draw[:, 1]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    matrix = torch.cat([turn * scale[:, None, None], 0.15 * draw[:, 2:, None]], 2)
    grid = F.affine_grid(matrix, [len(pictures), 1, SIDE, SIDE], align_corners=False)
    seen = F.grid_sample(pictures, grid, mode="bilinear", align_corners=False)
    return seen + 0.25 * torch.randn(seen.shape, generator=dice)


def train(seed: int, epochs: int, folder: Path) -> Case:
    """Train the dense network with the product's own training, unless ``folder`` has it."""
    learn, hold = digits(seed)
    data = from_dataset(learn, EXAMPLE, batch=32, seed=seed)
    test = from_dataset(hold, EXAMPLE, batch=128)
    torch.manual_seed(seed)
    options = FinetuneOptions(epochs=epochs, lr=0.05, weight_decay=5e-4, seed=seed, device="cpu")
    kept = folder / f"dense-{seed}-{epochs}.pt"
    if kept.exists():
        module: nn.Module = DigitNet().eval()
        module.load_state_dict(torch.load(kept, weights_only=True))
    else:
        module = finetune(DigitNet(), None, data, options).module
        torch.save(module.state_dict(), kept)
    few = data.first(FEW).rebatched(64)
    return Case(module, data, test, few, seed, evaluate(module, test).top1)


def recovered(case: Case, module: nn.Module, epochs: int, rate: float | None = None) -> float:
    """Top-1 after fine-tuning with the dense network as teacher, mean over orders; 0: as it is.

    ``rate`` is the highest learning rate; ``None`` is the default for the number of steps.
    """
    seeds = [case.seed + 100 * order for order in range(ORDERS if epochs else 1)]
    runs = [training(case, epochs, seed, rate)(module).module for seed in seeds]
    return statistics.fmean(evaluate(one, case.test).top1 for one in runs)


def training(case: Case, epochs: int, seed: int, rate: float | None) -> Training:
    """The fine-tuning, which is the same for everybody but for the highest rate."""
    options = FinetuneOptions(epochs=epochs, lr=rate, seed=seed, device="cpu")
    return Training(case.teacher, case.train, options)


class Pruner:
    """One method on one case: from a wanted latency to builds, and from a build to a module."""

    def __init__(self, method: str, case: Case, yard: Yard) -> None:
        self.method, self.case, self.yard = method, case, yard
        self._losses: dict[tuple[tuple[str, int], ...], float] = {}
        if method in OURS:
            self.scores = score("taylor", case.module, yard.graph, case.few)
            curves = importance_curves(yard.graph, self.scores)
            self.choices = choices(yard.graph, curves, multiple=yard.multiple)
            if method == TRAINED:
                curves = trained_curves(yard.graph, self.scores)
            elif method == PLAIN:
                rises = sensitivity.curves(
                    yard.graph, sensitivity.measure(self.choices, self._loss)
                )
                curves = blended(rises, curves, TIE)
            self.choices = choices(yard.graph, curves, multiple=yard.multiple)
        else:
            self.gradients = gradients(case)

    def search(self, limit: float, most: int, before: Sequence[Trial] = ()) -> list[Trial]:
        """Builds on the way to ``limit``, a fraction of the dense latency; ours go on."""
        if self.method in OURS:
            rank = self._loss if self.method == PLAIN else None
            return correct(self.yard, self.choices, limit, most, rank, before)
        return bisect(self._peer, self.yard, limit, most)

    def module(self, trial: Trial, epochs: int) -> nn.Module:
        """The pruned network of a build, for so many epochs of fine-tuning.

        Ours is reconstructed, the peer's BatchNorm re-estimated.
        """
        if isinstance(trial.setting, float):
            module = self._peer(trial.setting)
            reestimate_batchnorm(module, self.case.few)
            return module
        plan = channels(self.yard.graph, self.scores, trial.setting)
        module = self._cut(trial.setting)
        lasts = epochs > 0 and training(self.case, epochs, 0, None).settles
        restore(module, self.case.module, self.yard.graph, plan, self.case.few, trained=lasts)
        return module

    def _cut(self, counts: Mapping[str, int]) -> nn.Module:
        plan = channels(self.yard.graph, self.scores, counts)
        return apply(self.case.module, self.yard.graph, plan, EXAMPLE)

    def _loss(self, counts: Mapping[str, int]) -> float:
        key = tuple(sorted(counts.items()))
        if key not in self._losses:
            module = self._cut(counts) if counts else copy.deepcopy(self.case.module)
            reestimate_batchnorm(module, self.case.few)
            self._losses[key] = evaluate(module, self.case.few).loss
        return self._losses[key]

    def _peer(self, ratio: float) -> nn.Module:
        module = copy.deepcopy(self.case.module)
        for parameter, gradient in zip(module.parameters(), self.gradients, strict=True):
            parameter.grad = gradient.clone()
        step = self.yard.multiple if self.method.endswith("round_to") else None
        options = {"global_pruning": "global" in self.method, "round_to": step}
        return torch_pruning(module, EXAMPLE[0], ratio, "taylor", options)


def gradients(case: Case) -> list[Tensor]:
    """Gradient of the loss over the calibration samples, per parameter."""
    module = copy.deepcopy(case.module).eval()
    for inputs, labels in case.few:
        assert labels is not None
        F.cross_entropy(module(*inputs), labels).backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def torch_pruning(
    module: nn.Module, example: Tensor, ratio: float, criterion: str, options: Mapping[str, Any]
) -> nn.Module:
    """Prune ``module`` in place with Torch-Pruning; class scores stay."""
    import torch_pruning as peer

    kind = {"taylor": "GroupTaylorImportance", "l2": "GroupMagnitudeImportance"}[criterion]
    last = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = peer.pruner.BasePruner(
            module,
            example,
            importance=getattr(peer.importance, kind)(),
            pruning_ratio=ratio,
            ignored_layers=[last],
            **options,
        )
        pruner.step()
    module.zero_grad(set_to_none=True)
    return module.eval()


PLANTED = (0, 2)  # blocks that get as many useless inner channels again


def plant(case: Case, kind: str) -> Case:
    """A network that computes the same with twice the inner width in two of its blocks.

    ``dead``: the new channels are copies one and a half times as large, which nothing reads.
    ``copied``: they are copies, and original and copy are read at half weight each.
    """
    source = case.module
    assert isinstance(source, DigitNet)
    inner = {place: 2 * source.blocks[place].conv1.out_channels for place in PLANTED}
    planted = DigitNet(inner)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    dice = torch.Generator().manual_seed(case.seed)
    for place in PLANTED:
        half = inner[place] // 2
        order = torch.randperm(2 * half, generator=dice)
        new = order >= half  # which of the channels are planted
        for name in ("conv1.weight", *(f"bn1.{n}" for n in source.blocks[place].bn1.state_dict())):
            key = f"blocks.{place}.{name}"
            if state[key].ndim:
                state[key] = state[key][order % half]
        if kind == "dead":
            state[f"blocks.{place}.bn1.weight"][new] *= 1.5
            state[f"blocks.{place}.conv1.weight"][new] *= 1.5
            state[f"blocks.{place}.bn1.running_mean"][new] *= 1.5
            state[f"blocks.{place}.bn1.running_var"][new] *= 1.5**2
        share = torch.full((2 * half,), 0.5) if kind == "copied" else (~new).float()
        key = f"blocks.{place}.conv2.weight"
        state[key] = state[key][:, order % half] * share[None, :, None, None]
    planted.load_state_dict(state)
    planted.eval()
    top1 = evaluate(planted, case.test).top1
    return Case(planted, case.train, case.test, case.few, case.seed, top1)
