"""Targets from smooth to sign: how hard each is for the initial features, and how far the features adapt."""

from adaptive_tangents.experiments.study import Study

NAME = "hard-targets"
STUDIES = (
    Study(
        NAME,
        "Do features adapt more if the target is harder for the initial features?",
        place=2,
        minutes=32.3,
        package=__name__,
    ),
)
