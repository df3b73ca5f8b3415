"""The file of advice on adapters beside an inspection's results."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from adaptive_tangents import cli
from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.lora import LORA_FILE, advised, write_advice
from adaptive_tangents.measures import lora_advice

RESULTS = {"blocks": {
    "embeddings.word": {"shape": [16, 90]}, "layer.0.query": {"shape": [16, 17]}, "layer.0.up": {"shape": [40, 17]},
    "layer.0.norm.weight": {"shape": [16, 1]}, "head": {"shape": [2, 17]},
}}  # fmt: skip
ARRAYS = {f"singular_values.change.{name}": np.array(values) for name, values in {
    "embeddings.word": [9.0] * 16, "layer.0.query": [3.0, 1.0, 0.9], "layer.0.up": [2.0, 0.1], "layer.0.norm.weight": [1.0],
    "head": [1.0, 1.0],
}.items()}  # fmt: skip


def test_the_file_holds_the_arguments_that_peft_takes_and_the_sentence_tells_them(tmp_path: Path) -> None:
    sentence = write_advice(RESULTS, ARRAYS, tmp_path)
    held = json.loads((tmp_path / LORA_FILE).read_text("utf-8"))
    assert held["rank_pattern"] == {"layer.0.query": 2, "layer.0.up": 1}
    assert held["modules_to_save"] == ["head"]
    assert sentence is not None
    assert "ranks 1 to 2 in 2 layers" in sentence
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]


def test_ranks_are_those_of_the_singular_values() -> None:
    found = advised(RESULTS, ARRAYS)
    assert found is not None
    plain = lora_advice({"layer.0.query": np.diag([3.0, 1.0, 0.9] + [0.0] * 13)})
    assert found.rank_pattern["layer.0.query"] == plain.rank_pattern["layer.0.query"]


def test_advice_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    write_advice(RESULTS, ARRAYS, tmp_path)
    write_advice(RESULTS, ARRAYS, tmp_path)
    (tmp_path / LORA_FILE).write_text('{"mine": 1}')
    with pytest.raises(TangentError, match=r"lora\.json was not written by adaptive-tangents"):
        write_advice(RESULTS, ARRAYS, tmp_path)
    (tmp_path / LORA_FILE).unlink()
    (tmp_path / LORA_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TangentError, match="not replaced"):
        write_advice(RESULTS, ARRAYS, tmp_path)


def test_without_matrices_there_is_no_file(tmp_path: Path) -> None:
    assert write_advice({"blocks": {"norm.weight": {"shape": [16, 1]}}}, {}, tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_an_older_advice_goes_where_there_is_none_now(tmp_path: Path) -> None:
    write_advice(RESULTS, ARRAYS, tmp_path)
    assert write_advice({"blocks": {}}, {}, tmp_path) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / LORA_FILE).write_text('{"mine": 1}')
    with pytest.raises(TangentError, match="not replaced"):
        write_advice({"blocks": {}}, {}, tmp_path)


def test_a_lora_file_of_the_users_is_refused_before_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / LORA_FILE).write_text('{"mine": 1}')
    for command, options in (("inspect", ["--start", "a.pt", "--end", "b.pt"]), ("forecast", [])):
        done = CliRunner().invoke(cli.app, [command, "--data", "none.npz", "--out", ".", *options])
        assert done.exit_code == 1
        assert "lora.json was not written by adaptive-tangents" in " ".join(done.output.split())


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TangentError, match="cannot be written"):
        write_advice(RESULTS, ARRAYS, tmp_path / "file" / "sub")
