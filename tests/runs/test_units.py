"""Parts of a run on disk: complete or absent, tied to their settings, and found again after an interruption."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.runs.units import SETTINGS_FILE, StoredUnits, read_checkpoints, write_checkpoint
from study_cases import ended

CONFIG = {"seed": 0, "widths": [3, 4]}
PART = {"w": torch.arange(6.0).reshape(2, 3)}


def fail(*_: Any, **__: Any) -> None:
    raise OSError("full")


def test_parts_are_found_by_a_run_of_the_same_settings_that_resumes(tmp_path: Path) -> None:
    StoredUnits(tmp_path, CONFIG).put("one", PART)
    assert StoredUnits(tmp_path, CONFIG).get("one") is None
    units = StoredUnits(tmp_path, CONFIG, resume=True)
    assert torch.equal(units("one", lambda: pytest.fail("made again"))["w"], PART["w"])


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    StoredUnits(tmp_path, CONFIG).settle()
    with pytest.raises(
        TangentError, match=r"reproduce: .* holds a run made with other settings \(seed\); give another"
    ):
        StoredUnits(tmp_path, CONFIG | {"seed": 1})


def test_checkpoints_of_other_settings_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "one", PART, CONFIG)
    with pytest.raises(
        TangentError, match=r"resume: .*one.safetensors was made with other settings; run with the same"
    ):
        read_checkpoints(tmp_path, CONFIG | {"seed": 5})


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "one", PART, CONFIG)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TangentError, match=r"resume: .* cannot be read .*; delete it to repeat its training"):
        read_checkpoints(tmp_path, CONFIG)


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(TangentError, match=r"checkpoint: .* cannot be written \(full\); choose another folder"):
        write_checkpoint(tmp_path, "one", PART, CONFIG)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_settings_that_cannot_be_written_leave_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StoredUnits(tmp_path, CONFIG).settle()
    before = (tmp_path / SETTINGS_FILE).read_bytes()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(
        TangentError, match=r"reproduce: .*settings.json cannot be written \(full\); choose another folder"
    ):
        StoredUnits(tmp_path, CONFIG).settle()
    assert [path.name for path in tmp_path.iterdir()] == [SETTINGS_FILE]
    assert (tmp_path / SETTINGS_FILE).read_bytes() == before


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_settings_are_whole_or_absent_after_a_kill_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The kill comes while the new file is empty, or just before it replaces the old one."""
    with monkeypatch.context() as patch:
        if moment == "replace":
            patch.setattr("os.replace", die)
        else:
            real = Path.open

            def cut(self: Path, *arguments: Any, **keywords: Any) -> Any:
                file = real(self, *arguments, **keywords)
                if SETTINGS_FILE in self.name and "w" in "".join(map(str, arguments)):
                    file.write(b"{" if "b" in arguments[0] else "{")
                    file.flush()
                    die()
                return file

            patch.setattr(Path, "open", cut)
        assert ended(lambda: StoredUnits(tmp_path, CONFIG).put("one", PART)) == -signal.SIGKILL
    assert not (tmp_path / SETTINGS_FILE).exists()
    units = StoredUnits(tmp_path, CONFIG, resume=True)
    units.put("one", PART)
    assert StoredUnits(tmp_path, CONFIG, resume=True).get("one") is not None


def test_a_killed_run_resumed_makes_only_what_is_missing_and_ends_the_same(tmp_path: Path) -> None:
    def run(folder: str, killed_before: int = -1, resume: bool = False) -> None:
        def make(k: int) -> dict[str, torch.Tensor]:
            if k == killed_before:
                die()
            made.append(k)
            return {"x": torch.randn(3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)}

        made: list[int] = []
        units = StoredUnits(tmp_path / folder, CONFIG, resume=resume)
        total = sum(units(f"part{k}", lambda k=k: make(k))["x"] for k in range(4))
        (tmp_path / folder / "told").write_text(f"{made} {total.tolist()}")

    assert ended(lambda: run("whole")) == 0
    assert ended(lambda: run("killed", killed_before=2)) == -signal.SIGKILL
    assert ended(lambda: run("killed", resume=True)) == 0
    whole, rest = ((tmp_path / folder / "told").read_text() for folder in ("whole", "killed"))
    assert whole.startswith("[0, 1, 2, 3] ")
    assert rest == whole.replace("[0, 1, 2, 3] ", "[2, 3] ")
