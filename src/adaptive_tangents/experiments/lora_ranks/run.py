"""Do adapters whose ranks follow the change of weights learn more than adapters of one rank?

A pretrained sentence encoder (MiniLM, six layers) with a new head learns which of scipy's packages a sentence is about, from
some of the sentences of scipy's own documentation. It is fine-tuned whole, and by adapters of low rank (LoRA) in all of its
linear layers. These have one rank in all layers, or the same number of parameters where ``lora_advice`` puts them: by the
change of weights of full fine-tuning, by that change weighed by what it does to the outputs, and by the change that a
forecast foretells before any training. Everything else is the same: texts, head, batches, steps, and the learning rate,
which is the best of a few for uniform rank on a draw that is not measured.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.lora_ranks import NAME
from adaptive_tangents.experiments.lora_ranks.adapters import (
    ADAPTED,
    HEAD,
    Task,
    Way,
    absent,
    adapted,
    encoder,
    matrices,
    ranks_of,
    trained,
)
from adaptive_tangents.experiments.lora_ranks.claims import ADVISED, claims
from adaptive_tangents.experiments.lora_ranks.texts import drawn, tokens
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.forecasting.forecast import forecast
from adaptive_tangents.measures.lora_advice import SHARE, LoraAdvice, lora_advice
from adaptive_tangents.runs.record import Clock, RunResult, flatten, heading, settings
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.structures.base import Fixed

_TUNED = 1000  # added to the seed of the draw on which the rate is chosen
_FULL, _ADVICE, _TRAIN = 2.0, 4.0, 1.0  # work, in trainings of adapters


@dataclass(frozen=True)
class LoraRanksConfig:
    """Sizes of the task and of the trainings.

    ``train`` and ``test`` count sentences of each package, of at most ``tokens`` tokens. ``budgets`` are uniform ranks, which
    say how many parameters adapters have; ``rates`` are tried for them, and ``full_rate`` is for full fine-tuning. The
    forecast, one step of the fixed kernel, and the features see ``told`` sentences.
    """

    encoder: Literal["minilm", "tiny"] = "minilm"
    packages: tuple[str, ...] = ("stats", "signal", "linalg", "optimize")
    seed: int = 0
    seeds: int = 5
    train: int = 24
    test: int = 30
    tokens: int = 16
    budgets: tuple[int, ...] = (1, 2)
    epochs: int = 5
    batch: int = 16
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    full_rate: float = 1e-4
    told: int = 24

    def __post_init__(self) -> None:
        counts = (self.seeds, self.train, self.test, self.tokens, self.epochs, self.batch, self.told, len(self.rates))
        if min(counts) < 1 or not self.budgets or min(*self.budgets, *self.rates, self.full_rate) <= 0:
            raise TangentError(f"{NAME}: counts, budgets and rates must be positive, got {self}")
        if len(self.packages) < 2:
            raise TangentError(f"{NAME}: at least two packages are needed, got {self.packages}")

    @property
    def pretrained(self) -> bool:
        """Whether the encoder is a pretrained one."""
        return self.encoder == "minilm"


def configured(asked: Asked) -> LoraRanksConfig:
    """The settings for what the command line asked; a quick run trains a tiny encoder with random weights."""
    config = LoraRanksConfig(
        seed=asked.seed,
        seeds=asked.seeds or asked.sized(LoraRanksConfig.seeds, quick=2, full=10),
        epochs=asked.epochs or asked.sized(LoraRanksConfig.epochs),
        train=asked.sized(LoraRanksConfig.train, full=36),
        budgets=asked.sized(LoraRanksConfig.budgets, quick=(1,), full=(1, 2, 4)),
    )
    if asked.size == "quick":
        config = replace(config, encoder="tiny", rates=(0.01, 0.03), full_rate=0.003)
    return config


def run(
    config: LoraRanksConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Train by adapters of advised ranks and of one rank, and compare held-out losses. Each training is a part of the run.

    If transformers, peft or the encoder's weights are not installed, nothing is measured, and the results say so.
    Raises TangentError if scipy's packages hold too few sentences, or if training diverges.
    """
    units = units or Units()
    why = absent(pretrained=config.pretrained)
    arms = 1 + len(ADVISED)
    of_seed = _FULL + _ADVICE + arms * len(config.budgets) * _TRAIN
    clock = Clock(progress, len(config.rates) * _TRAIN + config.seeds * of_seed)
    found = {} if why else _measured(config, device, clock, units)
    results = {
        **heading(NAME, settings(config), clock, device),
        "seed": config.seed,
        "skipped": {config.encoder: why} if why else {},
        "claims": claims(found["seeds"], config.budgets) if found else {},
        **found,
        "metrics": _metrics(found["seeds"]) if found else {},
    }
    return RunResult(results, _arrays(found["seeds"]) if found else {})


def _measured(config: LoraRanksConfig, device: str, clock: Clock, units: Units) -> dict[str, Any]:
    rates = _rates(config, device, clock, units)
    rate = min(rates, key=lambda r: rates[r])
    if not rates[rate] < float("inf"):
        raise TangentError(f"{NAME}: training diverged at every rate of {config.rates}; use lower ones")
    seeds = [_of_seed(config, config.seed + k, rate, device, clock, units) for k in range(config.seeds)]
    return {"rate": rate, "rates": {f"{r:g}": loss for r, loss in rates.items()}, "seeds": seeds}


def _task(config: LoraRanksConfig, seed: int, device: str) -> Task:
    texts, y, held_out, y_test = drawn(NAME, config.packages, config.train, config.test, seed)
    x, x_test = (tokens(of, config.tokens, pretrained=config.pretrained) for of in (texts, held_out))
    return Task(x.to(device), y.to(device), x_test.to(device), y_test.to(device))


def _model(config: LoraRanksConfig, seed: int, device: str) -> nn.Module:
    return encoder(len(config.packages), seed, pretrained=config.pretrained).to(device)


def _rates(config: LoraRanksConfig, device: str, clock: Clock, units: Units) -> dict[float, float]:
    """The held-out loss at each rate of adapters of the first budget's rank, on a draw that is not measured."""
    seed, found = config.seed + _TUNED, {}
    for rate in config.rates:
        with clock.stage(f"rate {rate:g}", _TRAIN) as advance:
            make = partial(_adapters, config, seed, config.budgets[0], rate, device, advance)
            made = units(f"rates.{rate:g}", make)
        found[rate] = float(made["loss"].nan_to_num(torch.inf))
    return found


def _adapters(
    config: LoraRanksConfig, seed: int, ranks: Mapping[str, int] | int, rate: float, device: str,
    advance: Callable[[float], None],
) -> dict[str, Tensor]:  # fmt: skip
    model = adapted(_model(config, seed, device), ranks, seed)
    return trained(model, _task(config, seed, device), Way(rate, config.epochs, config.batch), seed, advance)


def _of_seed(
    config: LoraRanksConfig, seed: int, rate: float, device: str, clock: Clock, units: Units
) -> dict[str, Any]:
    """Fine-tune one draw whole, take advice, and train adapters of each budget by each advice."""
    with clock.stage(f"seed {seed}, full fine-tuning and advice", _FULL + _ADVICE) as advance:
        kept = units(f"seed{seed}.advice", lambda: _advice(config, seed, device, advance))
    names = list(matrices(_model(config, seed, "cpu").state_dict()))
    layers = [name.removesuffix(".weight") for name in names]
    found: dict[str, Any] = {
        "full": _numbers(kept),
        "layers": layers,
        "ranks": {
            key.removeprefix("ranks."): dict(zip(layers, map(int, value), strict=True))
            for key, value in kept.items()
            if key.startswith("ranks.")
        },
        "arms": {},
    }
    for budget in config.budgets:
        for arm in ("uniform", *ADVISED):
            ranks = budget if arm == "uniform" else {k: r for k, r in found["ranks"][f"{arm}.{budget}"].items() if r}
            with clock.stage(f"seed {seed}, rank {budget}, {arm}", _TRAIN) as advance:
                make = partial(_adapters, config, seed, ranks, rate, device, advance)
                made = units(f"seed{seed}.{arm}.{budget}", make)
            found["arms"][f"{arm}.{budget}"] = _numbers(made)
    return found


def _numbers(made: Mapping[str, Tensor]) -> dict[str, float]:
    found = {name: float(made[name]) for name in ("loss", "accuracy", "adapters")}
    if not found["loss"] < float("inf"):
        raise TangentError(f"{NAME}: training diverged; use a lower rate")
    return found | {"last_loss": float(made["losses"][-1])}


def _advice(config: LoraRanksConfig, seed: int, device: str, advance: Callable[[float], None]) -> dict[str, Tensor]:
    """Full fine-tuning, and the ranks of each advice in the order of the layers: of each budget, and for a share of 90%."""
    model, task = _model(config, seed, device), _task(config, seed, device)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    weights = matrices(start)
    done = _FULL / (_FULL + _ADVICE)
    some = torch.randperm(len(task.x), generator=torch.Generator().manual_seed(seed))[: config.told]
    x, y = task.x[some], nn.functional.one_hot(task.y[some], len(config.packages)).float()
    told = forecast(model, x, y, structure=Fixed(), steps=1, validation=0.0, wrt=(*weights, f"{HEAD}.*"), seed=seed)
    way = Way(config.full_rate, config.epochs, config.batch)
    made = trained(model, task, way, seed, lambda fraction: advance(done * fraction))
    end = {name: value.detach().clone() for name, value in model.state_dict().items()}
    middle = {name: (value + end[name]) / 2 if value.is_floating_point() else value for name, value in start.items()}
    feats = tangent_features(model, x, params=middle, wrt=weights)
    sources: dict[str, tuple[Any, dict[str, Any]]] = {
        "weights": ((start, end), {}), "outputs": ((start, end), {"features": feats}), "forecast": (told, {}),
    }  # fmt: skip
    for arm, (source, options) in sources.items():
        advice = lora_advice(source, wrt=ADAPTED, share=SHARE, **options)
        made[f"ranks.{arm}.share"] = _ranks(advice, start, weights)
        for budget in config.budgets:
            made[f"ranks.{arm}.{budget}"] = _ranks(advice.again(uniform_rank=budget), start, weights)
    return made


def _ranks(advice: LoraAdvice, start: Mapping[str, Tensor], weights: tuple[str, ...]) -> Tensor:
    """The rank of every layer in order; layers whose adapters would be no smaller count with all of their ranks."""
    ranks = ranks_of(advice) | {name: min(start[f"{name}.weight"].shape) for name in advice.whole}
    return torch.tensor([ranks.get(name.removesuffix(".weight"), 0) for name in weights], dtype=torch.float64)


def _metrics(seeds: list[dict[str, Any]]) -> dict[str, float | None]:
    arms = {"full": [each["full"] for each in seeds]} | {
        arm: [each["arms"][arm] for each in seeds] for arm in seeds[0]["arms"]
    }
    return flatten({
        arm: {key: float(np.mean([numbers[key] for numbers in of])) for key in ("loss", "accuracy")}
        for arm, of in arms.items()
    })  # fmt: skip


def _arrays(seeds: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Held-out losses of each arm by seed, and ranks of each advice (seeds, layers)."""
    found = {"loss.full": np.array([each["full"]["loss"] for each in seeds])}
    for arm in seeds[0]["arms"]:
        found[f"loss.{arm}"] = np.array([each["arms"][arm]["loss"] for each in seeds])
    for key in seeds[0]["ranks"]:
        found[f"ranks.{key}"] = np.array([list(each["ranks"][key].values()) for each in seeds])
    return found
