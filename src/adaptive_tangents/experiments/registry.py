"""Every study by name, in order of presentation, found in the folders beside this file."""

import pkgutil
from importlib import import_module
from pathlib import Path

from adaptive_tangents.experiments.study import Study


def _found() -> dict[str, Study]:
    folder = Path(__file__).parent
    packages = [entry.name for entry in pkgutil.iter_modules([str(folder)]) if entry.ispkg]
    found: list[Study] = []
    for name in packages:
        found += import_module(f"adaptive_tangents.experiments.{name}").STUDIES
    return {study.name: study for study in sorted(found, key=lambda study: study.place)}


STUDIES: dict[str, Study] = _found()
