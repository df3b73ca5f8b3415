"""What training will do: a forecast, inspected as if it had happened, and beside what happened if that is known."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive_tangents.checks import Values, class_columns
from adaptive_tangents.errors import TangentError
from adaptive_tangents.forecasting.cost import ForecastPlan
from adaptive_tangents.forecasting.forecast import forecast
from adaptive_tangents.forecasting.results import Forecast
from adaptive_tangents.inspection.first_screen import FORETOLD
from adaptive_tangents.inspection.foretold_plan import Clock, ForetoldPlan, measuring
from adaptive_tangents.inspection.judged import two_classes
from adaptive_tangents.inspection.measures import defined
from adaptive_tangents.inspection.outputs import network_outputs
from adaptive_tangents.inspection.problem import InspectConfig
from adaptive_tangents.inspection.run import run
from adaptive_tangents.loading import Data, fit_data, pick
from adaptive_tangents.measures.alignment import cka
from adaptive_tangents.runs.record import RunResult
from adaptive_tangents.runtime.progress import Progress, silent

NAME = "forecast"
# Of its results; the experiment that judges forecasts is called forecast, too.
KIND = FORETOLD
LOSSES = ("auto", "squared", "cross-entropy")
_CHEAP = 1.0  # operations: no models are fitted to what happened


def run_forecast(
    model: nn.Module,
    start: Mapping[str, Tensor],
    data: Data,
    config: InspectConfig,
    *,
    end: Mapping[str, Tensor] | None = None,
    loss: str = "auto",
    steps: int | None = None,
    max_epochs: float | None = None,
    show: Callable[[ForetoldPlan], Any] | None = None,
    progress: Progress = silent,
) -> RunResult:
    """Foretell training from ``start`` on all samples, and measure the change as an inspection does.

    ``end`` is the state after training, which the forecast does not see, as it does not see samples held out. ``show`` is
    called with the plan of all that before the first step, and ``progress`` with the share of the expected time that has
    passed. Raises TangentError as ``forecast`` and ``run`` do, when data have no targets, or when no change is foretold.
    """
    data = fit_data(data, model, NAME)
    seen = data if data.held_out is None else data.take((~data.held_out).nonzero()[:, 0])
    y, loss = goal_of(network_outputs(model, start, data.take(torch.arange(1, device="cpu")).x), seen, loss)
    cheap = replace(config, fit_operations=_CHEAP)
    plans = [measuring(model, start, data, each) for each in ([config] if end is None else [config, cheap])]
    clock = Clock(progress, [plan.seconds if plan else 0.0 for plan in plans])

    def told_of(plan: ForecastPlan) -> None:
        clock.expected = plan.seconds[1]
        if show is not None:
            show(ForetoldPlan(plan, tuple(plans)))

    loaded = {name: value.detach().clone() for name, value in _held(model)}
    _put(model, start)
    try:
        told = forecast(
            model, seen.x, y, loss=loss, steps=steps, max_epochs=max_epochs, wrt=config.wrt, seed=config.seed,  # type: ignore[arg-type]
            output_fn=lambda out: pick(out, NAME), show=told_of, progress=clock.part(0),
        )  # fmt: skip
    finally:
        _put(model, loaded)
    if not told.steps:
        raise TangentError(f"{NAME}: no change is foretold: {told.reason}")
    found = run(model, {"start": start, NAME: told.params}, data, config, progress=clock.part(1))
    results = {**found.results, "experiment": KIND, "forecast": _numbers(told), "happened": None}
    arrays = dict(found.arrays)
    if end is not None:
        after = run(model, {"start": start, "end": end}, data, cheap, progress=clock.part(2))
        results["happened"] = beside(found, after)
        arrays |= {f"happened.{name}": after.arrays[name] for name in ("kernel.average", "kernel.final", "change")}
    return RunResult(results, arrays)


def _held(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _held(model):
            if name in state:
                tensor.copy_(state[name])


def goal_of(outputs: Tensor, data: Data, loss: str) -> tuple[Values, str]:
    """Targets and loss: labels by cross-entropy, real targets by squared error, unless another loss is asked for."""
    if loss not in LOSSES:
        raise TangentError(f"{NAME}: --loss is one of {', '.join(LOSSES)}, got {loss!r}")
    if data.y is None:
        raise TangentError(
            f"{NAME}: the data file has no y, so it is not known what training will learn; add targets y"
        )
    if loss == "auto":
        loss = "squared" if data.labels is None else "cross-entropy"
    if loss == "squared" and data.labels is not None:
        c = outputs.shape[1]
        if c == 1:
            pair = two_classes(data.labels)
            if pair is None:
                class_columns(NAME, data.labels, 1)
            below = data.labels.min() if pair is None else pair[0]
            return torch.where(data.labels == below, -1.0, 1.0).to(outputs)[:, None], loss
        return functional.one_hot(data.labels, c).to(outputs), loss
    return data.y, loss


def beside(found: RunResult, after: RunResult) -> dict[str, Any]:
    """The change that was foretold and the one that happened, in the same numbers."""
    one, other = found.results, after.results
    kernels = {
        stage: _agreement(found.arrays.get(f"kernel.{stage}"), after.arrays.get(f"kernel.{stage}"))
        for stage in ("average", "final")
    }
    nothing = _agreement(found.arrays["kernel.initial"], after.arrays.get("kernel.average"))
    names = list(one["blocks"])
    shares = {name: (_shares(one)[name], _shares(other)[name]) for name in names}
    ranks = {
        name: tuple(each["blocks"][name]["effective_rank"]["participation"] for each in (one, other)) for name in names
    }
    growth = [_growth(each.arrays) for each in (found, after)]
    return {
        "cka": kernels | {"without": nothing},
        "growth": [one["growth"]["final"], other["growth"]["final"]],
        "alignment": [each["alignment_centered"]["change"]["final"] for each in (one, other)],
        "shares": shares,
        "share_order": _order(*zip(*shares.values(), strict=True)) if len(names) > 1 else None,
        "ranks": ranks,
        "sample_order": _order(*growth),
        "performance": [each["performance"]["end"] for each in (one, other)],
    }


def _shares(results: Mapping[str, Any]) -> dict[str, float]:
    squares = {name: block["change_norm"] ** 2 for name, block in results["blocks"].items()}
    return {name: square / sum(squares.values()) for name, square in squares.items()}


def _agreement(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
    if one is None or other is None:
        return None
    return defined(cka, torch.from_numpy(one).double(), torch.from_numpy(other).double())


def _growth(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    grown: np.ndarray = arrays["kernel.average"].diagonal() / arrays["kernel.initial"].diagonal().clip(1e-300)
    return grown


def _order(one: Any, other: Any) -> float | None:
    """Spearman's rank correlation; None if one side is constant."""
    if min(np.ptp(one), np.ptp(other)) == 0:
        return None
    return float(scipy.stats.spearmanr(one, other).statistic)


def _numbers(told: Forecast) -> dict[str, Any]:
    """The forecast itself, as plain numbers."""
    return {
        "structure": str(told.structure),
        "name": told.called,
        "loss": told.loss,
        "reason": told.reason,
        "epochs": told.epochs,
        "initial_loss": told.initial_loss,
        "initial_held_out": told.initial_held_out,
        "steps": [asdict(step) for step in told.steps],
        "candidates": [
            {
                "structure": str(each.structure),
                "name": each.called,
                "held_out": each.held_out,
                "chosen": each.chosen,
                "steps": len(each.steps),
            }
            for each in told.candidates
        ],
        "blocks": {name: asdict(block) for name, block in told.blocks.items()},
    }
