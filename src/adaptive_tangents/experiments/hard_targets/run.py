"""Do features adapt more the harder a target is for the initial ones? From the smooth target to its sign, step by step.

The problem of kernel-alignment, digits 2 and 3, with targets y_τ ∝ tanh(y/τ) of unit mean square: the teacher's output y
itself where τ is large, its sign where τ is small. For every τ a student is trained from the same initial weights. How
poorly the initial kernel K_0 represents y_τ is told three ways: the norm y_τᵀK_0⁻¹y_τ, the energy of y_τ outside the ten
leading eigenvectors, the leave-one-out error of kernel interpolation. Set against these: what sim(K̄, K_y) gains over
sim(K_0, K_y), the size of the two-sided transform M that best takes the initial to the average features (`explain`), and
the size of M in the exact model, with what its K_M gains. Sizes are of M − I over all sides and layers.
Source: LeJeune & Alemohammad, CPAL 2024, §4: it aligns more where the initial features represent the target poorly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.alignment import alignment, representability
from adaptive_tangents.capture import tangent_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.claims import Verdict, claim, rank_correlation, spread
from adaptive_tangents.experiments.hard_targets import NAME
from adaptive_tangents.experiments.kernel_alignment.measures import Checkpoint, outputs
from adaptive_tangents.experiments.kernel_alignment.setup import (
    Problem,
    TeacherTask,
    asked_fields,
    config_dict,
    problem,
    student,
    trained,
)
from adaptive_tangents.experiments.study import Asked
from adaptive_tangents.explain import explain
from adaptive_tangents.path import average_features
from adaptive_tangents.penalties import Quadratic
from adaptive_tangents.runs.record import Clock, Progress, RunResult, flatten, heading, silent
from adaptive_tangents.runs.units import Units
from adaptive_tangents.solvers import fit
from adaptive_tangents.spectral import TwoSided
from adaptive_tangents.transforms import Sides, Transform

TOP = 10
# How poorly K_0 represents a target, three ways; each grows with it.
HARDNESS = {"rkhs_norm": "RKHS norm", "energy_outside": "energy outside", "leave_one_out": "leave-one-out error"}
# A rank correlation this large, mean over seeds, counts as growing together.
STRONG = 0.7

# Work expected of each stage, in seconds on one core with the default config: only their ratio matters.
_WORK = {"data": 1.0, "train": 12.0, "measure": 14.0}


@dataclass(frozen=True)
class HardTargetsConfig(TeacherTask):
    """The problem's settings, the temperatures τ from smooth to sign, and λ of the exact model's penalty."""

    experiment: ClassVar[str] = NAME

    seeds: int = 2
    path_nodes: int = 16
    temperatures: tuple[float, ...] = (10.0, 1.0, 0.5, 0.25, 0.1, 0.01)
    strength: float = 1.0
    max_rounds: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        falling = all(a > b for a, b in pairwise(self.temperatures))
        if len(self.temperatures) < 3 or not falling or self.temperatures[-1] <= 0:
            raise TangentError(f"{NAME}: at least 3 temperatures, positive and falling, got {self.temperatures}")


def configured(asked: Asked) -> HardTargetsConfig:
    """The settings for what was asked."""
    config = HardTargetsConfig(**asked_fields(asked, standard=2, full=5))
    return replace(config, path_nodes=8, temperatures=(10.0, 0.5, 0.01)) if asked.size == "quick" else config


def run(
    config: HardTargetsConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Train and measure one student for every temperature and seed; each training and each measurement is a part of the run.

    Raises TangentError where the data cannot be had or hold too few digits, and where training diverges.
    """
    each_seed = _WORK["data"] + len(config.temperatures) * (_WORK["train"] + _WORK["measure"])
    clock, units = Clock(progress, config.seeds * each_seed), units or Units()
    rows: list[list[dict[str, float]]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        each, prefix = replace(config, seed=seed), f"seed{seed}."
        with clock.stage(f"{prefix}data", _WORK["data"]):
            posed = problem(each, device)
        rows.append([])
        for temperature in config.temperatures:
            name, y = f"tau{temperature:g}", hard_target(posed.targets["smooth"], temperature)
            with clock.stage(f"{prefix}{name}.train", _WORK["train"]) as advance:
                start, end, losses = trained(each, name, y, posed, units, advance, device, prefix=prefix)
            with clock.stage(f"{prefix}{name}.measure", _WORK["measure"]):
                measured = units(f"{prefix}{name}.measured", _measurer(each, y, posed, start, end, device))
            rows[-1].append({key: float(value) for key, value in measured.items()} | {"train_mse": losses[-1]})
    arrays = {key: np.array([[cell[key] for cell in row] for row in rows]) for key in sorted(rows[0][0])}
    found = correlations(arrays, config.temperatures)
    results = {
        **heading(NAME, config_dict(config), clock, device),
        "seed": config.seed,
        "data": posed.data,
        "temperatures": list(config.temperatures),
        "measured": {key: values.tolist() for key, values in arrays.items()},
        "correlations": found,
        "claims": claims(arrays, found),
        "metrics": flatten({
            f"tau {t:g}": {key: float(values[:, k].mean()) for key, values in arrays.items()}
            for k, t in enumerate(config.temperatures)
        }),
    }  # fmt: skip
    return RunResult(results, arrays | {"temperatures": np.array(config.temperatures)})


def hard_target(y: Float[Tensor, "n 1"], temperature: float) -> Float[Tensor, "n 1"]:
    """tanh(y/τ), scaled to unit mean square.

    >>> hard_target(torch.tensor([[-3.0], [1e-3]]), 1e-6).tolist()
    [[-1.0], [1.0]]
    """
    values = torch.tanh(y / temperature)
    found: Tensor = values / values.square().mean().sqrt()
    return found


def _measurer(
    config: HardTargetsConfig, target: Tensor, posed: Problem, start: Checkpoint, end: Checkpoint, device: str
) -> Callable[[], dict[str, Tensor]]:
    """What measures one student: hardness of its target, alignments, sizes of transforms."""

    def make() -> dict[str, Tensor]:
        model, x, y = student(config, posed, device), posed.x[posed.chosen], target[posed.chosen]
        initial = tangent_features(model, x, params=start)
        average = average_features(model, start, end, x, nodes=config.path_nodes)
        final = tangent_features(model, x, params=end)
        assert average.change is not None
        structure = TwoSided(Quadratic(config.strength))
        exact = fit(initial, y - outputs(model, start, x), structure=structure, max_rounds=config.max_rounds)
        explanation = explain(initial, average, TwoSided())
        assert explanation.transforms is not None
        feats = {"initial": initial, "average": average, "final": final, "exact": exact.transform(initial)}
        kernels = {kind: of.kernel(outputs="trace") for kind, of in feats.items()}
        sims = {kind: alignment(kernel, average.change) for kind, kernel in kernels.items()}
        found = representability(kernels["initial"], y[:, 0])
        numbers = {
            "rkhs_norm": found.rkhs_norm,
            "energy_outside": 1 - float(found.energy[min(TOP, len(found.energy)) - 1]),
            "leave_one_out": found.leave_one_out_rmse,
            **{f"sim_{kind}": sim for kind, sim in sims.items()},
            "gain": sims["average"] - sims["initial"],
            "gain_exact": sims["exact"] - sims["initial"],
            "explained": explanation.total,
            "path_error_db": average.error_db,
        }
        for prefix, transforms in (("size", explanation.transforms), ("size_exact", exact.transforms)):
            numbers |= {f"{prefix}_{norm}": value for norm, value in sizes(transforms).items()}
        return {key: torch.tensor(float(value), dtype=torch.float64) for key, value in numbers.items()}

    return make


def sizes(transforms: Mapping[str, Transform]) -> dict[str, float]:
    """Nuclear and Frobenius norm of M − I, over both sides of all layers.

    >>> from adaptive_tangents.transforms import Matrix
    >>> found = sizes({"layer": Sides(Matrix(4 * torch.eye(2)), None)})
    >>> round(found["nuclear"], 6), round(found["frobenius"] ** 2, 6)
    (6.0, 18.0)
    """
    values = [torch.zeros(1, dtype=torch.float64)]
    for transform in transforms.values():
        assert isinstance(transform, Sides)
        for side in (transform.left, transform.right):
            if side is not None:
                matrix = side.matrix().double().cpu()
                values.append(torch.linalg.svdvals(matrix - torch.eye(len(matrix), dtype=matrix.dtype)))
    all_of_them = torch.cat(values)
    return {"nuclear": float(all_of_them.sum()), "frobenius": float(all_of_them.norm())}


AGAINST = ("gain", "size_nuclear", "size_frobenius", "gain_exact", "size_exact_nuclear", "size_exact_frobenius")


def correlations(
    arrays: Mapping[str, Float[np.ndarray, "seeds k"]], temperatures: tuple[float, ...]
) -> dict[str, dict[str, list[float]]]:
    """Spearman's correlation over temperatures of each way a target is hard with its sharpness 1/τ, gains and sizes."""
    sharp = 1 / np.array(temperatures)
    return {
        hard: {"sharpness": [rank_correlation(sharp, row) for row in arrays[hard]]}
        | {key: [rank_correlation(*rows) for rows in zip(arrays[hard], arrays[key], strict=True)] for key in AGAINST}
        for hard in HARDNESS
    }


def claims(
    arrays: Mapping[str, np.ndarray], found: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, dict[str, Any]]:
    """Each claim in words, whether the numbers bear it out, and the numbers."""
    nuance = "aligns more where the target is poorly represented by the initial features"
    sentences = {
        "premise": ("The sharper the target, the more poorly K_0 represents it", "sharpness", "premise of the nuance"),
        "aligns": ("The more poorly K_0 represents the target, the more sim(K̄, K_y) gains over K_0", "gain", nuance),
        "transform": ("… the larger the two-sided transform from initial to average features", "size_nuclear", None),
        "exact.size": ("… the larger M − I of the exact two-sided model", "size_exact_nuclear", "theory"),
        "exact.aligns": ("… the more the exact model’s K_M gains", "gain_exact", None),
    }
    made = {}
    for key, (text, against, published) in sentences.items():
        text = text.replace("…", "The more poorly K_0 represents the target,")
        series = arrays.get(against)
        made[key] = _together(text, {hard: found[hard][against] for hard in HARDNESS}, series, published)
    gain = arrays["gain"]
    made["ends"] = claim(
        "The sign’s alignment gains more than the smooth target’s",
        bool((gain[:, -1] > gain[:, 0]).all()),
        refuted_by="a seed in which it does not",
        published="0.40 against 0.17",
        evidence=f"gains {spread(gain[:, -1])} against {spread(gain[:, 0])}",
    )
    return made


def _together(
    text: str, found: Mapping[str, list[float]], values: np.ndarray | None, published: str | None
) -> dict[str, Any]:
    """A claim that something grows with each of the three ways a target is hard."""
    means = {hard: float(np.mean(of_seeds)) for hard, of_seeds in found.items()}
    strong = [hard for hard, mean in means.items() if mean >= STRONG]
    verdict: Verdict = "holds" if len(strong) == len(means) else "holds in part" if strong else "does not hold"
    parts = [
        f"{HARDNESS[hard]}: ρ {f'= {spread(of_seeds)}' if np.isfinite(means[hard]) else 'is not defined'}"
        for hard, of_seeds in found.items()
    ]
    if values is not None:
        parts.append(f"from {spread(values[:, 0])} (smooth) to {spread(values[:, -1])} (sign)")
    return claim(
        text,
        verdict,
        refuted_by=f"a rank correlation over temperatures below {STRONG:g}, mean over seeds, by all three measures",
        published=published,
        evidence="; ".join(parts),
        why="" if verdict == "holds" else f"not by {', '.join(HARDNESS[hard] for hard in means if hard not in strong)}",
    )
