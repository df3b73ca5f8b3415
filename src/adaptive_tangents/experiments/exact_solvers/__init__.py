"""Newton's method, alternation and Anderson acceleration on one problem, and the rank of its solution."""

from adaptive_tangents.experiments.study import Study

NAME = "exact-solvers"
STUDIES = (
    Study(
        NAME,
        "Do all solvers of the exact model reach the same optimum, and at what cost?",
        place=7,
        minutes=1.0,
        package=__name__,
    ),
)
