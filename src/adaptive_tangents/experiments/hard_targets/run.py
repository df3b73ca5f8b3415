"""Do features adapt more if the target is harder for the initial features? Targets go from smooth to sign.

The problem is that of kernel-alignment, digits 2 and 3, with targets y_τ ∝ tanh(y/τ) of unit mean square: the teacher's
output y for large τ, its sign for small τ. For every τ a student is trained from the same initial weights. Three measures
say how poorly the initial kernel K_0 represents y_τ: the norm y_τᵀK_0⁻¹y_τ, the energy of y_τ outside the ten leading
eigenvectors, and the leave-one-out error of kernel interpolation. They are compared with the gain of sim(K̄, K_y) over
sim(K_0, K_y), the size of the two-sided transform M that best maps the initial to the average features (`explain`), the
size of M in the exact model, and the gain of its K_M. Sizes are of M − I over all sides and layers.
Source: LeJeune & Alemohammad, CPAL 2024, §4: K̄ aligns more if the initial features represent the target poorly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.path_average import average_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.hard_targets import NAME
from adaptive_tangents.experiments.hard_targets.claims import claims, correlations
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
from adaptive_tangents.features.transforms import Sides, Transform
from adaptive_tangents.measures.alignment import alignment, representability
from adaptive_tangents.measures.explain import explain
from adaptive_tangents.penalties.closed_forms import Quadratic
from adaptive_tangents.runs.record import Clock, RunResult, flatten, heading
from adaptive_tangents.runs.units import Units
from adaptive_tangents.runtime.progress import Progress, silent
from adaptive_tangents.solvers.fit import fit
from adaptive_tangents.structures.spectral import TwoSided

TOP = 10
# Expected work of each stage, in seconds on one core with the default config; only ratios matter.
_WORK = {"data": 1.0, "train": 12.0, "measure": 14.0}


@dataclass(frozen=True)
class HardTargetsConfig(TeacherTask):
    """Settings: the problem, the temperatures τ from smooth to sign, and λ of the exact model's penalty."""

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
            raise TangentError(
                f"{NAME}: at least 3 positive and falling temperatures are needed, got {self.temperatures}"
            )


def configured(asked: Asked) -> HardTargetsConfig:
    """The settings for what the command line asked."""
    config = HardTargetsConfig(**asked_fields(asked, standard=2, full=5))
    return replace(config, path_nodes=8, temperatures=(10.0, 0.5, 0.01)) if asked.size == "quick" else config


def run(
    config: HardTargetsConfig,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    units: Units | None = None,
) -> RunResult:
    """Train and measure one student for every temperature and seed; each training and measurement is a part of the run.

    Raises TangentError if the data are not available or hold too few digits, or if training diverges.
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
    """A function that measures one student: hardness of its target, alignments, sizes of transforms."""

    def make() -> dict[str, Tensor]:
        model, x, y = student(config, posed, device), posed.x[posed.chosen], target[posed.chosen]
        initial = tangent_features(model, x, params=start)
        average = average_features(model, start, end, x, nodes=config.path_nodes)
        final = tangent_features(model, x, params=end)
        assert average.change is not None
        structure = TwoSided(Quadratic(config.strength))
        exact = fit(initial, y - outputs(model, start, x), structure=structure, max_rounds=config.max_rounds)
        explanation = explain(initial, average, TwoSided(), rank=None)
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
    """Nuclear and Frobenius norms of M − I, over both sides of all layers.

    >>> from adaptive_tangents.features.transforms import Matrix
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
