"""What training will do to a network's tangent features, foretold before it is trained and compared with what it did."""

from adaptive_tangents.experiments.study import Study

NAME = "forecast"
STUDIES = (
    Study(
        NAME,
        "Can what training does to a network’s tangent features be foretold before it is trained?",
        place=10,
        minutes=60.0,
        package=__name__,
    ),
)
