"""The studies: each folder measures published and new claims, judges them, and has a page for them.

Every folder here is found automatically. Its ``__init__`` holds ``STUDIES`` and imports nothing heavy. The other modules
are the run (settings, measurements), the claims with their verdicts, and the page with its figures.
"""

from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.experiments.study import Asked, Study

__all__ = ["STUDIES", "Asked", "Study"]
