"""Transforms of each layer that explain the feature change of three trained networks, compared with the exact model's."""

from adaptive_tangents.experiments.study import Study

NAME = "feature-change"
STUDIES = (
    Study(
        NAME,
        "Is the feature change a transform of each layer, and is it the one that the exact model finds?",
        place=3,
        minutes=13.7,
        package=__name__,
    ),
)
