"""Every experiment by its name, in the order they are told."""

from typing import Any, Protocol, runtime_checkable

from adaptive_tangents.experiments import (
    exact_solvers,
    feature_change,
    hard_targets,
    kernel_alignment,
    kernel_spectra,
    low_rank_targets,
    penalties,
    sample_complexity,
    weight_spectra,
)
from adaptive_tangents.experiments.common import Asked, ExperimentResult, Progress, Units


@runtime_checkable
class Experiment(Protocol):
    """What a file of an experiment has: its name, settings for what was asked, and a run of them."""

    NAME: str

    def configured(self, asked: Asked) -> Any:
        """The settings for what was asked."""

    def run(
        self, config: Any, *, device: str = "cpu", progress: Progress = ..., units: Units | None = None
    ) -> ExperimentResult:
        """Measure everything."""


EXPERIMENTS: dict[str, Experiment] = {
    module.NAME: module
    for module in (
        kernel_alignment,
        hard_targets,
        feature_change,
        kernel_spectra,
        weight_spectra,
        penalties,
        exact_solvers,
        low_rank_targets,
        sample_complexity,
    )
}

LONGEST_FIRST = tuple(
    module.NAME
    for module in (
        sample_complexity,
        hard_targets,
        low_rank_targets,
        feature_change,
        weight_spectra,
        kernel_spectra,
        kernel_alignment,
        exact_solvers,
        penalties,
    )
)
"""The order to begin them in when several run at once: by their minutes in docs/results.md."""
