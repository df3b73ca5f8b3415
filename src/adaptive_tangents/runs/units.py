"""Parts of a run, each made once and saved as a checkpoint: a complete file or none, tied to the settings that made it."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runs.own_files import check_ours
from adaptive_tangents.runtime.tensor_files import ReadError, read_metadata, read_tensors, write_file, write_tensors

Tensors = Mapping[str, Tensor]
FOLDER, SETTINGS_FILE = "checkpoints", "settings.json"


class Units:
    """Parts of a run, each made once. This class forgets them after the run; `StoredUnits` lets an interrupted run continue.

    A part is a set of tensors that depend only on the settings and the part's name, not on what was made before.
    """

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The part if it was made before, else None."""
        return None

    def put(self, name: str, tensors: Tensors) -> None:
        """Keep a part."""

    def __call__(self, name: str, make: Callable[[], Tensors]) -> dict[str, Tensor]:
        """The part, made now if it was not made before."""
        found = self.get(name)
        if found is None:
            found = dict(make())
            self.put(name, found)
        return found


class StoredUnits(Units):
    """Parts of a run as checkpoints in its folder; ``resume`` reuses those of an earlier run with the same settings.

    Raises TangentError if the folder holds a run of other settings, or a part cannot be read or written.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        self.directory, self.config = directory, config
        _claim_folder(directory, config)
        self.found = read_checkpoints(directory, config) if resume else {}

    def get(self, name: str) -> dict[str, Tensor] | None:
        return self.found.get(name)

    def put(self, name: str, tensors: Tensors) -> None:
        self.settle()
        write_checkpoint(self.directory, name, tensors, self.config)

    def settle(self) -> None:
        """Write the settings into the folder: from now on it belongs to this run."""
        content = f"{_text(self.config)}\n".encode()
        try:
            write_file(self.directory / SETTINGS_FILE, lambda file: file.write(content))
        except OSError as error:
            raise TangentError(
                f"reproduce: {self.directory / SETTINGS_FILE} cannot be written ({error}); choose another folder with --out"
            ) from error


def write_checkpoint(directory: Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write one checkpoint into ``directory``/checkpoints, replacing an older one in one step.

    Raises TangentError if the folder cannot be written, or if something else has written a file of that name.
    """
    path = directory / FOLDER / f"{name}.safetensors"
    _check_ours(path)
    try:
        write_tensors(path, tensors, {"config": _text(config)})
    except OSError as error:
        raise TangentError(
            f"checkpoint: {path} cannot be written ({error}); choose another folder with --out"
        ) from error
    return path


def read_checkpoints(directory: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """All checkpoints of an earlier run with the same settings, by name.

    Raises TangentError if one was made with other settings, or cannot be read.
    """
    found = {}
    for path in sorted((directory / FOLDER).glob("*.safetensors")):
        try:
            made_with, tensors = read_metadata(path).get("config"), read_tensors(path)
        except ReadError as error:
            raise TangentError(f"resume: {path} cannot be read ({error}); delete it to repeat its training") from error
        if made_with != _text(config):
            raise TangentError(
                f"resume: {path} was made with other settings; run with the same ones, without --resume, or into another "
                "folder with --out"
            )
        found[path.name.removesuffix(".safetensors")] = tensors
    return found


def _claim_folder(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise TangentError if the folder's run had other settings."""
    if os.path.lexists(directory / SETTINGS_FILE) and not os.path.isfile(directory / SETTINGS_FILE):
        raise TangentError(f"reproduce: {directory / SETTINGS_FILE} is not a file; give another folder with --out")
    try:
        made_with = json.loads((directory / SETTINGS_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        check_ours("reproduce", directory)
        for path in (directory / FOLDER).glob("*.safetensors"):
            _check_ours(path)
        return
    except (OSError, ValueError, RecursionError) as error:
        raise TangentError(f"reproduce: {directory / SETTINGS_FILE} cannot be read ({error}); delete it") from error
    if not isinstance(made_with, dict):
        raise TangentError(
            f"reproduce: {directory / SETTINGS_FILE} was not written by adaptive-tangents, so it is not replaced; give "
            "another folder with --out"
        )
    wanted = json.loads(_text(config))
    differing = sorted(key for key in wanted.keys() | made_with.keys() if wanted.get(key) != made_with.get(key))
    if differing:
        raise TangentError(
            f"reproduce: {directory} holds a run made with other settings ({', '.join(differing)}); give another folder "
            "with --out, or delete it"
        )


def _check_ours(path: Path) -> None:
    """Raise TangentError if a file is there that is not a checkpoint of a run."""
    if not os.path.lexists(path):
        return
    try:
        ours = not path.is_symlink() and isinstance(json.loads(read_metadata(path)["config"]), dict)
    except (*ReadError, KeyError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise TangentError(
            f"checkpoint: {path} was not written by adaptive-tangents, or is damaged, so it is not replaced; move it away, "
            "or give another folder with --out"
        )


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)
