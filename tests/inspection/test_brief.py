"""What the terminal says after an inspection, a forecast and a comparison: a headline, and at most five lines."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from test_first_screen import DEEP, results

import adaptive_tangents
from adaptive_tangents.inspection.brief import MOST, told
from adaptive_tangents.inspection.first_screen import headline
from adaptive_tangents.reporting.report import _notation
from adaptive_tangents.runtime.told import short

Numbers = dict[str, Any]


def inspected(**more: Any) -> Numbers:
    return results(DEEP) | {
        "experiment": "inspect", "cka": {"final": 0.61}, "explain": {"two_sided": {"total": 0.754}}, "adapters": None, **more,
    }  # fmt: skip


def side(samples: int, before: float, after: float) -> Numbers:
    return {"samples": samples, "performance": {"start": {"accuracy": before}, "end": {"accuracy": after}}}


def test_a_headline_and_lines_in_order_of_importance() -> None:
    first, lines = told(inspected(held_out={"held_out": side(8, 0.25, 0.875), "trained": side(24, 0.25, 1.0)}))
    assert first == headline(inspected())
    assert lines == [
        "On 8 samples held out: accuracy 25 % → 88 % (trained on: 25 % → 100 %).",
        "Centered alignment with the labels 0.10 → 0.60, with its own change 0.10 → 0.60; CKA of K₀ and K_T 0.61.",
        "The kernel’s trace is 2.3× that at the start, most in embeddings (2.0×); 20 % of it is embeddings.",
        "A transform on both sides of each block explains R² = 0.75 of the features’ change.",
    ]


def test_of_more_than_five_findings_the_least_important_are_on_the_page_only() -> None:
    everything = inspected(
        interrupted=["the exact models"], calibrated=3, adapters="LoRA adapters of rank 2 in 3 layers (60 parameters, 1 % of "
        "these layers) hold 99 % of the layers' change of weights.",
        held_out={"held_out": side(8, 0.25, 0.875), "trained": side(24, 0.25, 1.0)},
    )  # fmt: skip
    _, lines = told(everything)
    assert len(lines) == MOST == 5
    assert lines[0] == "The run was interrupted; not measured: the exact models."
    assert lines[1].startswith("Part of this change is calibration, not training: 3 norms start")
    assert not any("LoRA" in line for line in lines)
    _, fewer = told(everything | {"interrupted": [], "calibrated": 0})
    assert fewer[-1] == "LoRA adapters of rank 2 in 3 layers hold 99 % of the layers' change of weights (lora.json)."


def test_a_line_is_a_line_whatever_the_names_are() -> None:
    long = [{**row, "name": f"{row['name']} of a network with very long names of layers indeed"} for row in DEEP]
    _, lines = told(inspected() | {"layers": long})
    assert all(len(line) <= 150 for line in lines)


def forecast() -> Numbers:
    block = {"share": 0.5, "rank": 1.25, "shape": [8, 8]}
    step = {"loss": 0.1, "held_out": 0.2}
    made = {
        "initial_loss": 1.0,
        "initial_held_out": 1.1,
        "steps": [step, step],
        "epochs": 9.6,
        "blocks": {"a": block, "b": block},
    }
    return inspected() | {"experiment": "foretold", "forecast": made, "happened": None}


@pytest.mark.parametrize("growth", [2.3, 0.43, 1.0, None])
def test_a_forecast_never_reads_as_if_it_had_happened(growth: float | None) -> None:
    found = forecast() | {"growth": {"average": 1.5, "final": growth}}
    first, lines = told(found)
    assert first.startswith("Foretold: training takes the loss from 1")
    assert first.endswith("(2 exact fits, at the cost of 10 epochs).")
    assert lines[0] == "Will change most: a, 50 % (rank 1.2 of 8); b, 50 % (rank 1.2 of 8)."
    assert lines[1] == headline(found)
    assert lines[1].startswith("Foretold: ")
    assert not any(word in lines[1] for word in ("grew", "turned", "shrank", "kept", " was "))


def test_texts_have_one_way_to_write_percent_and_the_kernel_at_the_start() -> None:
    """As strings of the source: "90 %", and K₀ wherever no filter of a page or of matplotlib sets the index."""
    package = Path(adaptive_tangents.__file__).parent
    wrong = []
    for path in package.rglob("*.py"):
        wing = path.relative_to(package).parts[0]
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FormattedValue) and isinstance(node.format_spec, ast.JoinedStr):
                spec = "".join(str(part.value) for part in node.format_spec.values if isinstance(part, ast.Constant))
                wrong += [f"{path.name}: {spec}"] * (spec.endswith("%") and path.name != "claims.py")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
                bare = re.search(r"\d%(?!;|\))", text) and path.name not in ("claims.py", "run.py")
                old = wing in ("inspection", "commands") and "$" not in text and re.search(r"\bK_0\b", text)
                wrong += [f"{path.name}: {short(text, 60)}"] * bool(bare or (old and '"""' not in text))
    assert [each for each in wrong if "width:100%" not in each] == []


def test_symbols_are_typeset_from_either_spelling() -> None:
    assert _notation("K₀ and K_0, θ₀") == _notation("K_0 and K_0, θ_0")
    assert _notation("K₀ < 1") == "<i>K</i><sub>0</sub> &lt; 1"
    assert _notation(Markup("<b>K₀</b>")) == "<b><i>K</i><sub>0</sub></b>"
