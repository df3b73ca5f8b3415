"""How training turns the tangent kernel toward the task: teacher's targets, a trained student, its kernels and exact models.

``setup`` (problem, student, training) and ``measures`` serve other studies of the same problem too.
"""

from adaptive_tangents.experiments.study import Study

NAME = "kernel-alignment"
STUDIES = (
    Study(
        NAME,
        "Does training turn the tangent kernel toward the task, and more so where the target is hard?",
        place=1,
        minutes=8.2,
        package=__name__,
    ),
)
