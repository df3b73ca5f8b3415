"""Test error over the number of samples by two protocols: network, fixed and adaptive features, and exact fits."""

from adaptive_tangents.experiments.study import Study

NAME = "sample-complexity"
STUDIES = (
    Study(
        NAME,
        "How many samples do adaptive features need, and what did the published curves measure?",
        place=9,
        minutes=68.2,
        package=__name__,
    ),
)
