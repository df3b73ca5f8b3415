"""From the smooth target to its sign, step by step: how hard each is for the initial features, and how far these adapt."""

from adaptive_tangents.experiments.study import Study

NAME = "hard-targets"
STUDIES = (
    Study(
        NAME,
        "Do features adapt more the harder a target is for the initial ones?",
        place=2,
        minutes=32.3,
        package=__name__,
    ),
)
