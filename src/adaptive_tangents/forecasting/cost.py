"""What a forecast will take: seconds and memory, from a few timed samples and the known course of its steps."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.plans import WORKING_BYTES, matmul_speed, plan_block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.forecasting.trust_region import Ground
from adaptive_tangents.runtime.memory import format_bytes, limit_for
from adaptive_tangents.runtime.pace import Stage
from adaptive_tangents.runtime.progress import duration
from adaptive_tangents.structures.base import Fixed, Structure

# Kernels of a fit by whether it adapts, and factorizations by loss, too; measured on a multilayer network, a convolutional
# one with batch norms, and a transformer.
_KERNELS = {False: 1.0, True: 2.0}
_FACTORS = {"squared": {False: 1.0, True: 2.0}, "cross-entropy": {False: 6.0, True: 9.0}}
_OUTPUTS = 2.0  # passes forward for outputs in a step: the lengths it tries, and held-out samples
_DECOMPOSED = {"squared": 6.0, "cross-entropy": 15.0}  # decompositions of each block in a fit that adapts
_BLOCK = 0.02  # seconds that a fit takes for each block, however small
_TIMED = (8, 32)  # samples whose features are timed
_FEWEST = 2  # steps of a candidate, if the held-out loss falls in none
# Coefficients, gradients and transforms of a fit, each about as large as the parameters, in double precision.
_VECTORS = 12
_COPIES = 6  # matrices of a fit's system that are held at once, as `fit` counts them
_SHARE = 0.7  # of a large product's speed, which a factorization reaches


@dataclass(frozen=True)
class ForecastPlan:
    """What a forecast will do, told before its first step.

    Attributes:
        samples: that are fitted.
        held_out: samples held out.
        outputs: c.
        parameters: p.
        candidates: the structures that are tried, in words.
        fewest: steps in all, if the held-out loss falls in none.
        most: steps in all, if it falls in each, within ``max_epochs``.
        max_epochs: of passes, after which no step is begun.
        epochs: of passes that the fewest and the most steps take.
        seconds: that these take, if every step needs one fit.
        bytes: that are held at once, at most, besides the network.
    """

    samples: int
    held_out: int
    outputs: int
    parameters: int
    candidates: tuple[str, ...]
    fewest: int
    most: int
    max_epochs: float
    epochs: tuple[float, float]
    seconds: tuple[float, float]
    bytes: int

    def __str__(self) -> str:
        outputs = "1 output" if self.outputs == 1 else f"{self.outputs} outputs"
        return "\n".join([
            f"Forecast: {self.samples} samples to fit, {self.held_out} held out, {outputs}, {self.parameters:,} parameters",
            f"  tries    {'; '.join(self.candidates)}: {_between(f'{self.fewest}', f'{self.most}')} steps in all",
            f"  passes   {_between(f'{self.epochs[0]:.0f}', f'{self.epochs[1]:.0f}')} epochs; no step is begun that would go "
            f"beyond {self.max_epochs:g}",
            f"  memory   at most {format_bytes(self.bytes)} besides the network",
            f"  time     {_between(*map(duration, self.seconds))}, more where a step needs several fits",
        ])  # fmt: skip


def _between(least: str, most: str) -> str:
    return least if least == most else f"between {least} and {most}"


def step_name(name: str, step: int) -> str:
    """A step in words, the name of its stage."""
    return f"{name}, step {step}"


def epochs_of(passes: Mapping[str, float]) -> float:
    """Passes in epochs of training, a forward and a backward pass, the latter counted as two forward passes."""
    return (passes["forward"] + 2 * passes["backward"]) / 3


def epochs_of_features(outputs: int) -> float:
    """The epochs of the features of all samples, which take a backward pass for every output."""
    return epochs_of({"forward": 1, "backward": outputs})


def upcoming(
    taken: Sequence[int], over: Sequence[bool], most: int, spent: float, each: float, max_epochs: float
) -> list[tuple[int, int]]:
    """The steps to come, each as (candidate, step), if every one lowers the held-out loss.

    Candidates take their steps in turn: the first of each, the second of each, and so on. A step past the first is not
    begun if its features would take the passes beyond ``max_epochs``; those at θ₀ serve every candidate.

    Args:
        taken: steps that each candidate has taken.
        over: whether it takes no more.
        most: steps of each.
        spent: epochs of passes until now.
        each: epochs of the features of a step.
        max_epochs: of all passes.
    """
    left = [(step, k) for k, count in enumerate(taken) if not over[k] for step in range(count + 1, most + 1)]
    found = list[tuple[int, int]]()
    for step, k in sorted(left):
        if step > 1 and spent + each > max_epochs:
            break
        spent += (each if step > 1 or k == 0 else 0.0) + _OUTPUTS / 3
        found.append((k, step))
    return found


def stages_of(steps: Sequence[tuple[int, int]], names: Sequence[str], costs: "Costs") -> list[Stage]:
    """The stages of these steps, with their seconds."""
    return [
        Stage(step_name(names[k], step), costs.seconds(k, first=step == 1), "fixed" if k == 0 else "adapting")
        for k, step in steps
    ]


@dataclass(frozen=True)
class Costs:
    """Seconds of what a step takes: features, outputs, and the fit of each candidate; ``loading`` is paid once."""

    features: float
    outputs: float
    fits: tuple[float, ...]
    loading: float = 1.0

    def seconds(self, candidate: int, *, first: bool) -> float:
        """Of one step; the features at θ₀ are made in the first candidate's."""
        passes = 0.0 if first and candidate else self.features
        return (
            passes + _OUTPUTS * self.outputs + self.fits[candidate] + (self.loading if first and not candidate else 0.0)
        )


def planned(
    ground: Ground, start: Mapping[str, Tensor], structures: Sequence[Structure], names: Sequence[str], loss: str, most: int,
    max_epochs: float,
) -> tuple[ForecastPlan, Costs]:  # fmt: skip
    """The plan of a forecast with these candidates, each of at most ``most`` steps, and the seconds of their steps."""
    one, features, outputs = _timed(ground, start)
    n, c = samples(ground.x), one.c
    fits = tuple(fit_seconds(one, n, loss, adapts=not isinstance(each, Fixed)) for each in structures)
    costs, each = Costs(features.seconds(n), outputs.seconds(n), fits), epochs_of_features(c)
    steps = upcoming([0] * len(names), [False] * len(names), most, 1 / 3, each, max_epochs)
    least = most if ground.held is None else min(most, _FEWEST)
    few = [(k, step) for k, step in steps if step <= least]
    ends = [sum(s.seconds for s in stages_of(part, names, costs)) for part in (few, steps)]
    epochs = [(1 + len(part) * _OUTPUTS) / 3 + each * (1 + sum(step > 1 for _, step in part)) for part in (few, steps)]
    held = 0 if ground.held_x is None else samples(ground.held_x)
    return ForecastPlan(
        n, held, c, one.p, tuple(names), len(few), len(steps), max_epochs, (epochs[0], epochs[1]), (ends[0], ends[1]),
        _bytes(ground, one, n),
    ), costs  # fmt: skip


@dataclass(frozen=True)
class _Line:
    """Seconds by the number of samples, from those of two batches: a start, and the same for each sample more."""

    few: int
    first: float
    each: float

    def seconds(self, n: int) -> float:
        """Seconds of n samples."""
        return self.first + self.each * (n - self.few)


def _timed(ground: Ground, start: Mapping[str, Tensor]) -> tuple[TangentFeatures, _Line, _Line]:
    """The features of one sample, and how long features and outputs take by the number of samples."""
    there, x = ground.capture.at(start), ground.x
    few, many = (min(count, samples(x)) for count in _TIMED)

    def seconds(make: Callable[[Batch], object], count: int) -> float:
        batch = take(x, slice(0, count))
        make(batch)  # the first call loads what later ones find loaded
        began = time.perf_counter()
        make(batch)
        return time.perf_counter() - began

    def line(make: Callable[[Batch], object]) -> _Line:
        first, last = seconds(make, few), seconds(make, many)
        return _Line(many, last, max(0.0, last - first) / max(1, many - few))

    return there.features(take(x, slice(0, 1))), line(there.features), line(lambda batch: there.outputs(batch, {}))


def fit_seconds(one: TangentFeatures, n: int, loss: str, *, adapts: bool) -> float:
    """Seconds of one fit of n samples, from the features of one: kernels, factorizations, and decompositions of blocks."""
    size, p, factors = n * one.c, one.p, _FACTORS[loss][adapts]
    if p < size:
        work = factors * (2.0 * size * p**2 + p**3 / 3)
    else:
        pairs = (
            plan_block(b, b, n, n, one.c, "full", symmetric=True, budget=WORKING_BYTES, itemsize=8)
            for b in one.blocks.values()
        )
        work = _KERNELS[adapts] * sum(pair.effort for pair in pairs) + factors * size**3 / 3
    work += sum(_block_work(block, n, _DECOMPOSED[loss] if adapts else 0.0) for block in one.blocks.values())
    return work / (_SHARE * matmul_speed(torch.float64, one.device)) + _BLOCK * len(one.blocks)


def _block_work(block: Block, n: int, decompositions: float) -> float:
    """Operations that find the spans of a block's two sides, and decompose what is within them."""
    (o, i), rows = block.shape, n * max(1, block.positions)
    inner = sorted((min(o, rows * block.outputs), min(i, rows)))
    return 4.0 * (o * inner[0] ** 2 + i * inner[1] ** 2) + decompositions * 20.0 * inner[0] ** 2 * inner[1]


def _bytes(ground: Ground, one: TangentFeatures, n: int) -> int:
    """Features in their own precision and in double, and the matrices of a fit."""
    size, p = n * one.c, one.p
    matrix = p * max(p, size) if p < size else size**2
    features = one.bytes * n
    whole = features + features * 8 // one.dtype.itemsize + _VECTORS * 8 * p + _COPIES * 8 * matrix
    return min(whole, limit_for(ground.capture.requested, one.device))
