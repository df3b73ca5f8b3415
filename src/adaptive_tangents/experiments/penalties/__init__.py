"""The penalties on coefficients that penalties on the transform induce."""

from adaptive_tangents.experiments.study import Study

NAME = "penalties"
STUDIES = (
    Study(
        NAME,
        "What do penalties on the transform do to small and to large coefficients?",
        place=6,
        minutes=0.0,
        package=__name__,
    ),
)
