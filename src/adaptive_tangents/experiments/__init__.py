"""The studies: published and new claims, each measured, judged and told in a folder of its own.

A folder enrols its studies by being here: its ``__init__`` holds ``STUDIES``, light enough to be imported for a name. Beside
it lie the run (settings, measurements), the claims with their verdicts, and the page with its figures.
"""

from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.study import Asked, Study

__all__ = ["STUDIES", "Asked", "Study"]
