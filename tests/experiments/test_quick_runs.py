"""Quick end-to-end runs of the command on real digits."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adaptive_tangents import cli
from study_cases import in_outline


@pytest.mark.slow
def test_exact_solvers_prove_every_claim_and_show_them(tmp_path: Path) -> None:
    with in_outline():
        done = CliRunner().invoke(
            cli.app, ["reproduce", "exact-solvers", "--quick", "--seed", "1", "--out", str(tmp_path)]
        )
    assert done.exit_code == 0, done.output
    assert done.output.count("✓") == 7
    assert "✗" not in done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["config"]["samples"], results["seed"]) == (60, 1)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "Every claim holds." in text
    assert text.count("<figure ") == text.count("Look for") == 2
    assert re.findall(r"url\((?!#)|@import|https?:|file:|\{\{|\bNone\b|\bnan\b", text) == []
