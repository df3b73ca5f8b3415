"""Two studies of spectra before and after training: eigenvalues of tangent kernels, and singular values of weights."""

from adaptive_tangents.experiments.study import Study

KERNELS, WEIGHTS = "kernel-spectra", "weight-spectra"
STUDIES = (
    Study(
        KERNELS,
        "Which eigenvalues and eigenvectors of the tangent kernel does training change?",
        place=4,
        minutes=8.3,
        package=__name__,
        measured_in="kernels",
        told_in="kernels_page",
    ),
    Study(
        WEIGHTS,
        "Is the weight change low-rank, and do adaptive features make it so while fixed ones do not?",
        place=5,
        minutes=11.1,
        package=__name__,
        measured_in="weights",
        told_in="weights_page",
    ),
)
