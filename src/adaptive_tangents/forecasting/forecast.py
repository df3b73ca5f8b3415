"""forecast(): from a network and its data to what training will do, by steps that held-out samples choose."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, samples, take, tensors
from adaptive_tangents.capture.capture import Capture
from adaptive_tangents.capture.complex_parameters import as_given
from adaptive_tangents.capture.groups import Group
from adaptive_tangents.capture.network import OutputFn, Selection
from adaptive_tangents.capture.state_names import renamed
from adaptive_tangents.checks import Values, check_choice
from adaptive_tangents.errors import TangentError, raised_as
from adaptive_tangents.forecasting.cost import ForecastPlan, planned
from adaptive_tangents.forecasting.goals import Goal, goal_of
from adaptive_tangents.forecasting.results import BlockForecast, Candidate, Forecast, block_forecasts
from adaptive_tangents.forecasting.trials import Trial, chosen, run, trials
from adaptive_tangents.forecasting.trust_region import Ground, Iterate, outputs_at
from adaptive_tangents.forecasting.words import structure_words
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.runtime.pace import Pace
from adaptive_tangents.runtime.progress import Asked, silent, with_bar
from adaptive_tangents.runtime.progress import told as told_to
from adaptive_tangents.solvers.losses import LossName
from adaptive_tangents.structures.base import Fixed, Structure
from adaptive_tangents.structures.mixed import as_structure
from adaptive_tangents.structures.spectral import TwoSided

CALL = "forecast"
STRENGTHS = (1.0,)
RELATIVE_RIDGE = 3.0
MOST_STEPS = 8
MEASURED = 200
MOST_EPOCHS = 60.0


@with_bar
def forecast(
    model: nn.Module,
    x: Batch,
    y: Values,
    *,
    structure: Structure | Mapping[str, Structure] | None = None,
    loss: LossName = "squared",
    ridge: float | None = None,
    strength: float | Sequence[float] | None = None,
    steps: int | None = None,
    max_epochs: float | None = None,
    validation: float = 0.2,
    wrt: Selection | None = None,
    output_fn: OutputFn | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    show: Callable[[ForecastPlan], Any] | None = None,
    progress: Asked = None,
) -> Forecast:
    r"""What training will do to a network, before it is trained: θ_{k+1} = θ_k + sβ_k, without a gradient step.

    β_k is the exact adaptive fit of the features at θ_k to what is left of the target; s is found by the training loss. A
    step is taken if the loss falls by at least a quarter of what its fit predicts; if not, the ridge is four times as
    strong. Held-out samples choose the structure and the number of steps.

    Args:
        model: the network before training, in evaluation mode; it is left as it was.
        x: training inputs, samples first: a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
        y: targets, (n, c), or (n,) where c = 1; for cross-entropy integer labels (n,), 0 or 1 where c = 1.
        structure: which transforms the fits may use; a mapping gives structures by patterns of block names. None chooses
            between ``Fixed`` and ``TwoSided`` of each ``strength``.
        loss: "squared" or "cross-entropy" (logistic where c = 1): what training will minimize.
        ridge: κ > 0, the first step's ridge over the mean eigenvalue of its kernel; None is 3.
        strength: λ of ``TwoSided(Quadratic(λ))``, in units of the mean square of what is left of the target
            at θ₀; one or several to choose from. None is 1.
        steps: the most steps of each candidate; None is 8.
        max_epochs: passes over the samples, of all candidates together, in epochs of training (``Forecast.epochs``); no step
            is begun that would go beyond, but the first of each candidate is always taken. None is 60. Every step takes
            (1 + 2c)/3 epochs for its features.
        validation: the share of samples that are held out to choose; with 0, all steps are taken, and there must be
            nothing else to choose.
        wrt: the parameters that will be trained: a name pattern, a parameter, or several; None is all that require a
            gradient.
        output_fn: picks a tensor (n, c) from what the model returns; None takes that itself, or its `logits`.
        seed: of the choice of held-out samples.
        memory_limit: bytes that may be used; None is half of what is free.
        show: called with the ``ForecastPlan`` before the first step, such as ``print``: seconds, memory and passes.
        progress: called with the step and the share of the expected time that has passed; True shows a bar.

    Raises:
        TangentError: as ``tangent_features`` and ``fit`` do; when an option is out of range, or when nothing is held out and
            there is something to choose.

    Source: LeJeune & Alemohammad, CPAL 2024, §3, for each fit; the steps are this library's, theory in the docs.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> x = torch.randn(40, 3)
    >>> told = at.forecast(model, x, x[:, :1] * x[:, 1:2], steps=2)
    >>> sorted(told.params) == sorted(model.state_dict())
    True
    """
    check_choice(CALL, "loss", loss, get_args(LossName))
    kappa = RELATIVE_RIDGE if ridge is None else _positive("ridge", ridge)
    most = MOST_STEPS if steps is None else _steps(steps)
    largest = MOST_EPOCHS if max_epochs is None else _positive("max_epochs", max_epochs)
    if not _is_number(validation) or not 0 <= validation < 1:
        raise TangentError(f"{CALL}: validation is a share of the samples, from 0 to below 1, got {validation!r}")
    with raised_as(CALL, "fit"):
        given = None if structure is None else as_structure("fit", structure)
    if given is not None and strength is not None:
        raise TangentError(f"{CALL}: strength is of the structures that are chosen among; leave it out, or structure")
    listed = STRENGTHS if strength is None else tuple(strength) if isinstance(strength, Sequence) else (strength,)
    strengths = sorted({_positive("strength", value) for value in listed}, reverse=True)
    if not strengths:
        raise TangentError(f"{CALL}: strength is a positive number, or several, got none")
    capture = Capture(CALL, model, x, None, wrt, output_fn, memory_limit)
    start = dict(capture.network.parameters)
    before = outputs_at(capture, start, x)
    goal = goal_of(CALL, y, before, loss)
    ground, kept = _divided(capture, x, goal, validation, seed)
    if ground.held is None and given is None and (strength is None or len(strengths) > 1):
        raise TangentError(
            f"{CALL}: with validation = 0 nothing is held out to choose a structure by; give structure= or validation > 0"
        )
    size = float((ground.goal.missing(before[kept]) ** 2).mean())
    if given is not None:
        candidates: list[tuple[Structure, str]] = [(given, structure_words(given))]
    elif ground.held is None:
        candidates = [_two_sided(strengths[0], size)]
    else:
        candidates = [(Fixed(), structure_words(Fixed())), *(_two_sided(value, size) for value in strengths)]
    structures, names = zip(*candidates, strict=True)
    costs = None
    if show is not None or progress:
        plan, costs = planned(ground, start, structures, names, loss, most, largest)
        if show is not None:
            show(plan)
    pace, outputs = Pace(told_to(progress) or silent), ground.outputs(start)
    found = trials(ground, Iterate(ground, start, outputs), structures, names, kappa)
    with raised_as(CALL, "fit"):
        run(found, ground, outputs.shape[1], most, largest, pace, costs)
    pace.progress("done", 1.0)
    return _forecast(model, capture, ground, found, outputs, x, loss, kappa, validation, seed)


def _two_sided(strength: float, size: float) -> tuple[Structure, str]:
    # For targets that the network fits already, any penalty will do.
    return TwoSided(Quadratic(strength * size or strength)), f"two-sided, strength {strength:g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(name: str, value: object) -> float:
    if not _is_number(value) or not 0 < value < math.inf:  # type: ignore[operator]
        raise TangentError(f"{CALL}: {name} is a positive, finite number, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def _steps(steps: object) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise TangentError(f"{CALL}: steps is a positive whole number, got {steps!r}")
    return steps


def _divided(capture: Capture, x: Batch, goal: Goal, validation: float, seed: int) -> tuple[Ground, Tensor]:
    """The samples to fit and those held out, and which are fitted."""
    n, device = samples(x), tensors(x)[0].device
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)
    count = min(max(1, round(validation * n)), n) if validation else 0
    held, kept = order[:count].sort().values, order[count:].sort().values
    if not len(kept):
        raise TangentError(
            f"{CALL}: of n = {n} samples, validation = {validation:g} leaves none to fit; give more samples, or a "
            "smaller share"
        )
    if not count:
        return Ground(capture, x, goal, None, None), kept
    return Ground(capture, take(x, kept), goal.taken(kept), take(x, held), goal.taken(held)), kept


def _forecast(
    model: nn.Module, capture: Capture, ground: Ground, found: Sequence[Trial], outputs: Tensor, x: Batch, loss: LossName,
    kappa: float, validation: float, seed: int,
) -> Forecast:  # fmt: skip
    trial = chosen(found)
    start = dict(capture.network.parameters)
    few = (
        torch.linspace(0, samples(x) - 1, min(MEASURED, samples(x)), device="cpu")
        .round()
        .long()
        .to(tensors(x)[0].device)
    )
    return Forecast(
        model=model,
        start=_state(model, start),
        params=_state(model, trial.end),
        steps=tuple(trial.steps[: trial.chosen]),
        fits=tuple(trial.fits[: trial.chosen]),
        structure=trial.structure,
        loss=loss,
        ridge=kappa,
        validation=validation,
        seed=seed,
        initial_loss=ground.goal.loss(outputs),
        initial_held_out=math.nan if trial.initial is None else float(trial.initial.mean()),
        candidates=tuple(_candidate(each) for each in found),
        reason=trial.reason,
        passes=dict(ground.passes),
        wrt=capture.network.selected,
        output_fn=capture.network.output_fn,
        memory_limit=capture.requested,
        x=take(x, few),
        blocks=_blocks(capture, trial.end),
    )


def _candidate(trial: Trial) -> Candidate:
    held = math.nan if trial.held is None else trial.mean
    return Candidate(trial.structure, tuple(trial.steps), trial.chosen, held, trial.reason, trial.name)


def _blocks(capture: Capture, end: Mapping[str, Tensor]) -> dict[str, BlockForecast]:
    """What changes in each block."""
    start = capture.network.parameters
    before, after = ({group.name: _matrix(group, state) for group in capture.groups} for state in (start, end))
    return block_forecasts(before, after)


def _matrix(group: Group, state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([slot.place(state[slot.parameter], group.matrix[0]) for slot in group.slots], 1)


def _state(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict with these parameters, under every name that one has, and those that it leaves out."""
    first = {id(p): name for name, p in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)} | renamed(model)
    given = as_given(model, parameters)
    held = {key: value.detach() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    changed = {key: given[names[key]] for key in held if names.get(key) in given}
    left_out = given.keys() - {names[key] for key in changed}
    return {
        key: value.clone() for key, value in {**held, **changed, **{name: given[name] for name in left_out}}.items()
    }
