"""What the configuration of a transformers network says of its texts and labels is heeded."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adaptive_tangents import cli
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import load_data, load_tokenizer, open_series
from training_cases import TEXTS, bert_config, library, tokenizer

runner = CliRunner()
LONG = "a good film " * 9  # 29 tokens with those at both ends; the network takes 16


def network(folder: Path, **options: Any) -> Any:
    """A network for sequences, saved with its tokenizer."""
    transformers = library("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(bert_config(**options)).eval()
    model.save_pretrained(folder / "net")
    tokenizer(folder).save_pretrained(folder / "net")
    return model


def table(path: Path, texts: Sequence[str], labels: Sequence[Any], name: str = "label") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", name), *zip(texts, labels, strict=True)])
    return path


def test_texts_cut_at_the_networks_own_limit_are_told(tmp_path: Path) -> None:
    network(tmp_path)
    series = open_series("inspect", start=tmp_path / "net")
    path = table(tmp_path / "a.csv", ["fine", LONG, LONG], ["good", "bad", "bad"])
    for tokens in (series.tokenizer, load_tokenizer(tmp_path / "net", "inspect", 16)):
        data = load_data(path, tokenizer=tokens, classes=series.classes)
        assert isinstance(data.x, dict)
        assert data.x["input_ids"].shape == (3, 16)
        assert "2 of the 3 texts reach 16 tokens, and what comes after is cut." in data.notes
    data = load_data(path, tokenizer=series.tokenizer, classes=series.classes, max_length=5)
    assert "2 of the 3 texts reach 5 tokens, and what comes after is cut." in data.notes
    short = load_data(table(tmp_path / "b.csv", TEXTS, ["good"] * 8), tokenizer=series.tokenizer)
    assert not any("reach" in note for note in short.notes)


def test_a_length_beyond_the_networks_positions_is_refused(tmp_path: Path) -> None:
    network(tmp_path)
    path = table(tmp_path / "a.csv", ["fine", LONG], ["good", "bad"])
    words = "--max-length 17 is more than the 16 tokens that the network has positions for; give at most that many"
    series = open_series("inspect", start=tmp_path / "net")
    with pytest.raises(TangentError, match=words):
        load_data(path, tokenizer=series.tokenizer, max_length=17)
    given = ["kernel", "--weights", str(tmp_path / "net"), "--data", str(path), "--out", str(tmp_path / "K.zarr")]
    for more in ([], ["--tokenizer", str(tmp_path / "net")]):
        done = runner.invoke(cli.app, [*given, *more, "--max-length", "17"])
        assert done.exit_code == 1
        assert words in " ".join(done.output.replace("│", " ").split())
