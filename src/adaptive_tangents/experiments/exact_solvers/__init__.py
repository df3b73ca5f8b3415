"""Newton's method, the alternation and Anderson's extrapolation on one problem, and how low the rank of its solution is."""

from adaptive_tangents.experiments.study import Study

NAME = "exact-solvers"
STUDIES = (
    Study(
        NAME,
        "Do all solvers of the exact model end at one optimum, and at what cost?",
        place=7,
        minutes=1.0,
        package=__name__,
    ),
)
