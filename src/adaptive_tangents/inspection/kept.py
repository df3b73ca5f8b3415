"""What finished stages of an inspection found, kept in its folder so that an interrupted run continues.

A stage is one file, whole or absent, which says what it was made from: the same settings, states and samples, by hash.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError
from adaptive_tangents.runs.own_files import PROGRAM
from adaptive_tangents.runtime.tensor_files import ReadError, fingerprint, read_metadata, read_tensors, write_tensors

FOLDER = "stages"
_LONGEST = 100
_STAGE = re.compile(r"choices|start|end|average|models|explain \d+|checkpoint .*")


@dataclass(frozen=True)
class Record:
    """What a stage found: numbers and words as JSON holds them, and tensors."""

    numbers: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def copied(self) -> "Record":
        """The same in memory of its own: sums and products round by how numbers lie in memory, made or read."""
        kept = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in self.tensors.items()}
        return Record(self.numbers, kept)


class Kept:
    """Finished stages. This class forgets them; `KeptInFolder` lets an interrupted run continue."""

    keeps = False
    """Whether a later run may continue."""

    def claim(self, origin: Mapping[str, str]) -> None:
        """Say what this run's stages are made from, before the first of them."""

    def get(self, name: str) -> Record | None:
        """A stage that was finished before, else None."""
        return None

    def put(self, name: str, record: Record) -> None:
        """Keep a finished stage."""


class KeptInFolder(Kept):
    """Finished stages as files of the folder ``stages`` beside the results; ``resume`` takes those of an earlier run.

    Only files that an inspection has written are read, replaced or removed. Raises TangentError where a file is not its own,
    cannot be read or written, or was made from something else.
    """

    keeps = True

    def __init__(self, directory: Path, *, resume: bool) -> None:
        self.folder, self.resume = directory / FOLDER, resume
        self.origin: dict[str, str] = {}
        self.written = False
        self._stale: list[Path] = []

    def __str__(self) -> str:
        return str(self.folder)

    def claim(self, origin: Mapping[str, str]) -> None:
        self.origin = dict(origin)
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise TangentError(f"inspect: {self.folder} is not a folder; move it away, or give another with --out")
        for path in sorted(self.folder.glob("*.safetensors")):
            stored = _origin(path)
            if stored is None and _STAGE.fullmatch(path.stem):
                raise _not_ours(path)
            if stored is None or stored == self.origin:
                continue
            if not self.resume:
                self._stale.append(path)
                continue
            other = [k for k in {**stored, **self.origin} if stored.get(k) != self.origin.get(k)]
            raise TangentError(
                f"inspect: {self.folder} holds stages of a run with other {listed(other)}; resume it as it was started, "
                "run without --resume, or give another folder with --out"
            )

    def get(self, name: str) -> Record | None:
        path = self._path(name)
        if not self.resume or not os.path.lexists(path):
            return None
        if _origin(path) is None:
            raise _not_ours(path)
        try:
            told, tensors = read_metadata(path), read_tensors(path)
            # In the order in which they were made: a sum of them rounds by it.
            return Record(json.loads(told["numbers"]), {key: tensors[key] for key in json.loads(told["order"])})
        except (*ReadError, KeyError, ValueError) as error:
            raise TangentError(f"inspect: {path} cannot be read ({error}); delete it to repeat its stage") from error

    def put(self, name: str, record: Record) -> None:
        path = self._path(name)
        if os.path.lexists(path) and _origin(path) is None:
            raise _not_ours(path)
        words = {"origin": self.origin, "numbers": record.numbers, "order": list(record.tensors)}
        told = {"program": PROGRAM} | {key: json.dumps(value) for key, value in words.items()}
        try:
            while self._stale:  # of an earlier run, which this one replaces
                self._stale.pop().unlink(missing_ok=True)
            write_tensors(path, record.tensors, told)
        except OSError as error:
            raise TangentError(
                f"inspect: {path} cannot be written ({error}); give another folder with --out"
            ) from error
        self.written = True

    def _path(self, name: str) -> Path:
        plain = quote(name, safe=" ")
        short = plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}-{fingerprint(name)[:16]}"
        return self.folder / f"{short}.safetensors"


def _not_ours(path: Path) -> TangentError:
    return TangentError(
        f"inspect: {path} was not written by {PROGRAM}, or is damaged, so it is neither read nor replaced; move it away, or "
        "give another folder with --out"
    )


def _origin(path: Path) -> dict[str, str] | None:
    """What a stage was made from; None if the file is none of an inspection's."""
    try:
        told = read_metadata(path)
        found = json.loads(told["origin"]) if told["program"] == PROGRAM and not path.is_symlink() else None
    except (*ReadError, KeyError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
