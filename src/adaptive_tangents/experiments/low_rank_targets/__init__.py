"""Test errors over samples and dimensions for targets of few directions: exact fits, a network, feature machines."""

from adaptive_tangents.experiments.study import Study

NAME = "low-rank-targets"
STUDIES = (
    Study(
        NAME,
        "Do adaptive features need fewer samples if targets depend on few directions?",
        place=8,
        minutes=19.8,
        package=__name__,
    ),
)
