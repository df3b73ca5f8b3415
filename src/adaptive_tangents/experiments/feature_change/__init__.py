"""Transforms of each layer that explain how three trained networks' features changed, beside the exact model's own."""

from adaptive_tangents.experiments.study import Study

NAME = "feature-change"
STUDIES = (
    Study(
        NAME,
        "Is the change of features a transform of each layer, and the one the exact model finds?",
        place=3,
        minutes=13.7,
        package=__name__,
    ),
)
