"""How training turns the tangent kernel toward the task: a teacher's targets, a student, its kernels and exact models.

Other studies of the same problem also use ``setup`` (problem, student, training) and ``measures``.
"""

from adaptive_tangents.experiments.study import Study

NAME = "kernel-alignment"
STUDIES = (
    Study(
        NAME,
        "Does training turn the tangent kernel toward the task, and more so if the target is hard?",
        place=1,
        minutes=8.2,
        package=__name__,
    ),
)
