"""The results of ``forecast``: where training will lead, how it gets there, and what that does to the kernel."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch
from adaptive_tangents.capture.capture import Capture, tangent_features
from adaptive_tangents.capture.network import OutputFn
from adaptive_tangents.capture.path_average import average_features
from adaptive_tangents.errors import TangentError, raised_as
from adaptive_tangents.features.kernel_layout import Outputs
from adaptive_tangents.forecasting.cost import epochs_of
from adaptive_tangents.forecasting.files import read_forecast, write_forecast
from adaptive_tangents.forecasting.trust_region import Step
from adaptive_tangents.forecasting.words import structure_words
from adaptive_tangents.measures.alignment import alignment, cka, effective_rank
from adaptive_tangents.runtime.told import html, short
from adaptive_tangents.solvers.losses import LossName
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Structure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES = 8
_NUMBERS = ("loss", "ridge", "validation", "seed", "initial_loss", "initial_held_out", "reason", "wrt")


@dataclass(frozen=True)
class BlockForecast:
    """What will change in one block.

    Attributes:
        share: ‖θ̂ − θ₀‖² of the block over that of all blocks.
        norm: ‖θ̂ − θ₀‖ of the block.
        relative: over ‖θ₀‖ of the block; infinite if that is zero.
        rank: the effective rank (participation) of the change.
        shape: (o, i), with a bias as the last column.
    """

    share: float
    norm: float
    relative: float
    rank: float
    shape: tuple[int, int]


def block_forecasts(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, BlockForecast]:
    """The change of each block, from its matrices before and after."""
    changes = {name: after[name].double() - B.double() for name, B in before.items()}
    total = sum(float((change**2).sum()) for change in changes.values())
    found = {}
    for name, change in changes.items():
        norm, size = float(change.norm()), float(before[name].double().norm())
        found[name] = BlockForecast(
            norm**2 / total if total else 0.0, norm, norm / size if size else (float("inf") if norm else 0.0),
            effective_rank(change).participation, (change.shape[0], change.shape[1]),
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Candidate:
    """One structure that was tried.

    Attributes:
        structure: of its fits; its name in a forecast that was loaded.
        steps: all its steps.
        chosen: how many of these have the least held-out loss.
        held_out: that loss; NaN if nothing was held out.
        reason: why there were no more steps.
        name: the structure in words; empty in a forecast that an earlier version saved.
    """

    structure: Structure | str
    steps: tuple[Step, ...] = field(repr=False)
    chosen: int
    held_out: float
    reason: str
    name: str = ""

    @property
    def called(self) -> str:
        """The structure in words."""
        return self.name or structure_words(self.structure)


@dataclass(frozen=True, eq=False)
class ForecastKernels:
    """Kernels before, along and after the training that is foretold.

    Attributes:
        initial: K₀ at θ₀.
        average: K̄, of features averaged along the straight path θ₀ → θ̂.
        final: at θ̂.
    """

    initial: Tensor = field(repr=False)
    average: Tensor = field(repr=False)
    final: Tensor = field(repr=False)

    @property
    def cka(self) -> dict[str, float]:
        """CKA of K₀ with the average and with the final kernel: 1 where the kernel does not turn."""
        return {"average": cka(self.initial, self.average), "final": cka(self.initial, self.final)}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Forecast:
    """What training will do to a network: its parameters afterwards, and all that follows from them.

    Attributes:
        model: the network; None in a forecast that was loaded without one.
        start: θ₀, a state dict.
        params: θ̂, a state dict of tensors; what modules keep beside them (``get_extra_state``) is left out.
        steps: the steps taken.
        fits: the fit of each step; none in a forecast that was loaded. Their features are of one sample only, so that a
            forecast stays small.
        structure: of the fits; its name in a forecast that was loaded.
        loss: "squared" or "cross-entropy".
        ridge: κ of the first step.
        validation: the share of samples held out.
        seed: of their choice.
        initial_loss: the mean training loss at θ₀.
        initial_held_out: the mean held-out loss at θ₀; NaN if nothing was held out.
        candidates: what was chosen among, in order of how much it adapts.
        reason: why there are no more steps.
        passes: "forward" and "backward" passes over the training samples, of all candidates; one output's features take one
            backward pass.
        blocks: the change of each block.
        wrt: names of the parameters that are trained.
        output_fn: picks a tensor (n, c) from what the model returns.
        memory_limit: bytes that ``kernels`` may use.
        x: up to 200 of the samples, on which ``alignment`` is measured.
    """

    model: nn.Module | None = field(repr=False)
    start: Mapping[str, Tensor] = field(repr=False)
    params: Mapping[str, Tensor] = field(repr=False)
    steps: tuple[Step, ...]
    fits: tuple[Fit, ...] = field(repr=False)
    structure: Structure | str
    loss: LossName
    ridge: float
    validation: float
    seed: int
    initial_loss: float
    initial_held_out: float
    candidates: tuple[Candidate, ...] = field(repr=False)
    reason: str
    passes: Mapping[str, float]
    blocks: Mapping[str, BlockForecast] = field(repr=False)
    wrt: tuple[str, ...] = field(repr=False)
    output_fn: OutputFn | None = field(repr=False)
    memory_limit: int | None = field(repr=False)
    x: Batch | None = field(repr=False)

    def __repr__(self) -> str:
        last = self.steps[-1].loss if self.steps else self.initial_loss
        return (
            f"Forecast({len(self.steps)} steps of {short(self.called)}, {self.loss}: loss "
            f"{self.initial_loss:.4g} → {last:.4g}, {len(self.blocks)} blocks)"
        )

    def _repr_html_(self) -> str:
        last = self.steps[-1] if self.steps else None
        facts = {
            "structure": self.called, "steps": f"{len(self.steps)}; {self.reason}",
            "loss": f"{self.initial_loss:.4g} → {self.initial_loss if last is None else last.loss:.4g}",
            "held out": f"{self.initial_held_out:.4g} → {self.initial_held_out if last is None else last.held_out:.4g}",
            "cost": f"{self.epochs:.1f} epochs",
        }  # fmt: skip
        rows = (
            (name, f"{100 * block.share:.1f} %", block.rank, block.relative)
            for name, block in sorted(self.blocks.items(), key=lambda row: -row[1].share)
        )
        return html("Forecast", facts, ("block", "share of the change", "effective rank", "relative size"), rows)

    @property
    def called(self) -> str:
        """The structure in words, such as "kernel regression" or "two-sided, strength 1"."""
        taken = [each.name for each in self.candidates if str(each.structure) == str(self.structure)]
        return next(iter(taken), "") or structure_words(self.structure)

    @property
    def epochs(self) -> float:
        """The passes in epochs of training, a forward and a backward pass, the latter counted as two forward passes."""
        return epochs_of(self.passes)

    def kernels(self, x: Batch, *, outputs: Outputs = "full", nodes: int = NODES) -> ForecastKernels:
        """K₀, K̄ and K_T of the training that is foretold, at any samples.

        Args:
            x: samples first, as ``forecast`` takes them.
            outputs: "full", "trace" or "diagonal", as for ``TangentFeatures.kernel``.
            nodes: of the average along θ₀ → θ̂.
        """
        model = self._model("kernels")
        options: dict[str, Any] = {"wrt": self.wrt, "output_fn": self.output_fn, "memory_limit": self.memory_limit}
        with raised_as("kernels", "tangent_features", "average_features", "kernel"):
            first, last = (
                tangent_features(model, x, params=state, **options).kernel(outputs=outputs)
                for state in (self.start, self.params)
            )
            if not self.steps:
                return ForecastKernels(first, first, last)
            average = average_features(model, self.start, self.params, x, nodes=nodes, **options)
            return ForecastKernels(first, average.kernel(outputs=outputs), last)

    @cached_property
    def change(self) -> Float[Tensor, "m c"]:
        """f(x; θ̂) − f(x; θ₀) of the samples ``x``."""
        first, last = (_outputs(self, state) for state in (self.start, self.params))
        return last - first

    @cached_property
    def alignment(self) -> dict[str, dict[str, float]]:
        """Centered alignment of the initial, average and final kernel with the change foretold, and CKA with K₀.

        Measured on ``x``, with kernels summed over outputs. Empty where no change is foretold.
        """
        if not self.steps:
            return {}
        kernels = self.kernels(self._samples("alignment"), outputs="trace")
        stages = {"initial": kernels.initial, "average": kernels.average, "final": kernels.final}
        turned = {stage: alignment(K, self.change, centered=True) for stage, K in stages.items()}
        return {"change": turned, "cka": kernels.cka}

    def summary(self) -> str:
        """The forecast as text to read."""
        kind = {"squared": "squared error"}.get(self.loss, self.loss)
        if not self.steps:
            return f"Foretold: training on {kind} changes nothing; {self.reason}"
        last = self.steps[-1]
        held = "" if self.validation == 0 else f", held out {self.initial_held_out:.4g} → {last.held_out:.4g}"
        fits = "1 step" if len(self.steps) == 1 else f"{len(self.steps)} steps"
        lines = [
            f"Foretold: training on {kind} takes the loss {self.initial_loss:.4g} → {last.loss:.4g}{held}",
            f"  by          {fits} of {self.called}; {self.reason}",
        ]
        lines.append(
            f"  cost        {self.epochs:.1f} epochs ({self.passes['forward']:.0f} forward, {self.passes['backward']:.0f} "
            f"backward passes), {sum(step.seconds for each in self.candidates for step in each.steps):.1f} s"
        )
        for each in self.candidates if len(self.candidates) > 1 else ():
            mark = "*" if each.structure is self.structure else " "
            lines.append(f"{mark} held out    {each.held_out:.4g} after {each.chosen} steps of {each.called}")
        largest = sorted(self.blocks, key=lambda name: -self.blocks[name].share)[:8]
        for name in largest:
            block = self.blocks[name]
            lines.append(
                f"  {100 * block.share:5.1f} %     {name}, effective rank {block.rank:.1f} of {min(block.shape)}, "
                f"{block.relative:.2g} of its size"
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the forecast as a safetensors file with its numbers as JSON in the header; ``load_forecast`` reads it.

        Args:
            path: of the file.

        Raises:
            TangentError: when it cannot be written.
        """
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        numbers |= {
            "structure": str(self.structure),
            "steps": [asdict(step) for step in self.steps],
            "candidates": [asdict(replace(each, structure=str(each.structure))) for each in self.candidates],
            "passes": dict(self.passes),
            "blocks": {name: asdict(block) for name, block in self.blocks.items()},
        }
        write_forecast(Path(path), {"start": self.start, "params": self.params}, numbers)

    def plot(self) -> "Figure":
        """The loss at each step, the share and rank of each block's change, and how far the kernel turns."""
        try:
            from adaptive_tangents.forecasting.figures import draw_forecast
        except ImportError as error:
            raise TangentError(
                f"plot: {error.name} is not installed; pip install 'adaptive-tangents[report]' installs it"
            ) from error
        return draw_forecast(
            [self.initial_loss, *(step.loss for step in self.steps)],
            [self.initial_held_out, *(step.held_out for step in self.steps)],
            {name: block.share for name, block in self.blocks.items()},
            {name: block.rank for name, block in self.blocks.items()},
            self.alignment.get("change", {}),
        )

    def _model(self, call: str) -> nn.Module:
        if self.model is None:
            raise TangentError(f"{call}: this forecast was loaded without its network; use load_forecast(path, model)")
        return self.model

    def _samples(self, call: str) -> Batch:
        if self.x is None:
            raise TangentError(f"{call}: this forecast was loaded without samples; use load_forecast(path, model, x=x)")
        return self.x


def load_forecast(
    path: str | Path, model: nn.Module | None = None, *, x: Batch | None = None, output_fn: OutputFn | None = None
) -> Forecast:
    """A forecast that ``Forecast.save`` wrote, without its fits; structures are their names.

    Args:
        path: of the file.
        model: the network, for ``kernels``; None reads the numbers and states alone.
        x: samples on which ``alignment`` is measured.
        output_fn: picks a tensor (n, c) from what the model returns; None takes that itself, or its `logits`.

    Raises:
        TangentError: when the file cannot be read, or is no forecast.
    """
    states, numbers = read_forecast(Path(path))
    try:
        return Forecast(
            model=model,
            start=states["start"],
            params=states["params"],
            steps=tuple(Step(**step) for step in numbers["steps"]),
            fits=(),
            structure=numbers["structure"],
            candidates=tuple(
                Candidate(**{**each, "steps": tuple(Step(**step) for step in each["steps"])})
                for each in numbers["candidates"]
            ),
            passes=numbers["passes"],
            blocks={name: BlockForecast(**{**b, "shape": tuple(b["shape"])}) for name, b in numbers["blocks"].items()},
            output_fn=output_fn,
            memory_limit=None,
            x=x,
            **{name: numbers[name] for name in _NUMBERS if name != "wrt"},
            wrt=tuple(numbers["wrt"]),
        )
    except (KeyError, TypeError) as error:
        raise TangentError(
            f"load_forecast: {path} is damaged (it lacks {error}); give a file that Forecast.save wrote"
        ) from error


def _outputs(found: Forecast, state: Mapping[str, Tensor]) -> Tensor:
    model, x = found._model("change"), found._samples("change")
    return Capture("change", model, x, state, found.wrt, found.output_fn, found.memory_limit).outputs(x, {}).double()
