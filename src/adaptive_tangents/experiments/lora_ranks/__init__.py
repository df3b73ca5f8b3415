"""Adapters of low rank on a pretrained sentence encoder: advised ranks against one rank for all layers."""

from adaptive_tangents.experiments.study import Study

NAME = "lora-ranks"
STUDIES = (
    Study(
        NAME,
        "Do adapters whose ranks follow the change of weights learn more than adapters of one rank?",
        place=11,
        minutes=35.0,
        package=__name__,
    ),
)
