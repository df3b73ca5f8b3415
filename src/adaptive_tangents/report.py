"""Result folders: written whole or not at all, read back with clear errors, and told as one self-contained page."""

import base64
import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import jinja2
import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from adaptive_tangents import drawing, figures, inspection_report
from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiment_pages import (
    feature_change,
    hard_targets,
    kernel_alignment,
    kernel_spectra,
    low_rank_targets,
    overview,
    sample_complexity,
    weight_spectra,
)
from adaptive_tangents.pages import Page, given, number
from adaptive_tangents.pages import fixed as _fixed

T = TypeVar("T")
Results = Mapping[str, Any]
Arrays = Mapping[str, NDArray[Any]]

RESULTS_FILE, ARRAYS_FILE, PAGE_FILE, FIGURES_FOLDER = "results.json", "arrays.npz", "report.html", "figures"
_LABELS = {
    "alignment.initial": "sim(K_0, K_y)",
    "alignment.average": "sim(K̄, K_y)",
    "alignment.final": "sim(K_T, K_y)",
    "diagonal.near": "mean K̄(x, x) near the boundary",
    "diagonal.far": "mean K̄(x, x) far from the boundary",
    "diagonal_ratio": "K̄(x, x), near over far",
    "path_error_db": "accuracy of the path average, dB",
}


class Finding(NamedTuple):
    """One number of a run beside the published one and the one measured earlier for this project, all as text."""

    label: str
    ours: str
    paper: str
    project: str


def write_results(results: Results, arrays: Arrays, directory: str | os.PathLike[str]) -> Path:
    """Write `results.json` and `arrays.npz` into `directory`, each replaced in one step; return the folder.

    Non-finite numbers become null. Raises TangentError for a value JSON has no form for, or an array of objects.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_results({"experiment": "demo", "loss": float("nan")}, {"x": np.zeros(3)}, folder)
    ...     load_results(folder)
    ({'experiment': 'demo', 'loss': None}, {'x': array([0., 0., 0.])})
    """
    directory = Path(directory)
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.hasobject:
            raise TangentError(f"report: array {name!r} holds Python objects; give an array of numbers or text")
    text = json.dumps(_plain(results, "results"), indent=1, ensure_ascii=False, allow_nan=False)
    directory.mkdir(parents=True, exist_ok=True)
    # The arrays first: a folder whose results.json is new has its arrays too.
    # numpy 1.26 has no allow_pickle here and would store one as an array.
    _replace(directory / ARRAYS_FILE, lambda file: np.savez_compressed(file, **plain))  # type: ignore[arg-type]
    _put(directory / RESULTS_FILE, text.encode())
    return directory


def load_results(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a result folder back as (results, arrays). Raises TangentError where a part is missing or unreadable."""
    directory = Path(directory)
    if not directory.is_dir():
        raise TangentError(f"report: no folder {directory}; give the folder an experiment wrote its results to")
    source, store = directory / RESULTS_FILE, directory / ARRAYS_FILE
    if not source.is_file():
        raise TangentError(f"report: no {RESULTS_FILE} in {directory}; run an experiment with --out {directory} first")
    try:
        results = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TangentError(f"report: {source} is not valid JSON ({error}); run the experiment again") from error
    if not isinstance(results, dict) or "experiment" not in results:
        raise TangentError(f"report: {source} names no experiment; run the experiment again")
    if not store.is_file():
        raise TangentError(f"report: no {ARRAYS_FILE} beside {source}; copy it there or run the experiment again")
    try:
        with np.load(store, allow_pickle=False) as archive:
            return results, {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise TangentError(f"report: cannot read {store} ({error}); run the experiment again") from error


def build_report(directory: str | os.PathLike[str]) -> Path:
    """Draw every figure of a result folder as PNG and SVG, write the page, and return its path.

    Raises TangentError where `load_results` does, for an experiment without a page, and for missing arrays or numbers.
    """
    directory = Path(directory)
    results, arrays = load_results(directory)
    page = _page(results)
    missing = [name for name in _answered(page.arrays, results) if name not in arrays]
    if missing:
        raise TangentError(f"report: {ARRAYS_FILE} lacks {', '.join(missing)}; run the experiment again")
    # One precision for all drawings; images stay bytes.
    arrays = {name: array.astype(float) if array.dtype.kind == "f" else array for name, array in arrays.items()}
    drawings = _answered(
        lambda r: {
            name: drawing.render(draw, name, r, arrays) for name, draw in page.figures.items() if page.applies(r, name)
        },
        results,
    )
    html = _answered(lambda r: _render(page, r, drawings), results)
    folder = directory / FIGURES_FOLDER
    folder.mkdir(exist_ok=True)
    for name, figure in drawings.items():
        _put(folder / f"{name}.png", figure.png)
        _put(folder / f"{name}.svg", figure.svg.encode())
    _put(directory / PAGE_FILE, html.encode())
    return directory / PAGE_FILE


def summary_table(results: Results) -> list[Finding]:
    """The headline numbers and every number with a reference, as rows (label, ours, paper, project reference)."""
    metrics, reference = results.get("metrics", {}), results.get("reference", {})
    headline = [f"{target}.{key}" for target in results.get("targets", {}) for key in _page(results).headline]
    return [
        Finding(
            _label(key), number(metrics.get(key)), *(given(reference.get(key, {}).get(s)) for s in ("paper", "project"))
        )
        for key in dict.fromkeys((*headline, *reference))
    ]


def _plain(value: Any, where: str) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{k}]") for k, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TangentError(
        f"report: {where} is a {type(value).__name__}, which JSON cannot hold; give a number, text, a list or a mapping"
    )


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write beside the file and swap it in, so that a reader sees the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(name, 0o644)  # mkstemp's own mode would hide a shared folder's page from its other readers
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _put(path: Path, content: bytes) -> None:
    _replace(path, lambda file: file.write(content))


def _page(results: Results) -> Page:
    name = results.get("experiment")
    if name not in _PAGES:
        raise TangentError(f"report: no page for experiment {name!r}; the experiments with one are {', '.join(_PAGES)}")
    return _PAGES[name]


def _answered(question: Callable[[Results], T], results: Results) -> T:
    try:
        return question(results)
    except (KeyError, jinja2.UndefinedError) as error:
        raise TangentError(f"report: {RESULTS_FILE} is incomplete ({error}); run the experiment again") from error


def _label(key: str) -> str:
    target, _, rest = key.partition(".")
    return f"{drawing.label(target)}: {_LABELS.get(rest, drawing.label(rest.replace('.', ' ')))}"


def _inline(figure: drawing.Drawing) -> Markup:
    """The figure for the page: drawn shapes take the page's colours, pixels go in as PNG for their size."""
    if "<image" in figure.svg:
        return Markup('<img class="pixels" alt="" src="data:image/png;base64,{}">').format(
            base64.b64encode(figure.png).decode()
        )
    text = figure.svg[figure.svg.index("<svg") :]
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text)
    names = {drawing.INK: "ink", drawing.MUTED: "muted", drawing.RULE: "rule", drawing.PAPER: "paper"}
    return Markup(re.sub("|".join(names), lambda match: f"var(--{names[match[0]]})", text))


def _render(page: Page, results: Results, drawings: Mapping[str, drawing.Drawing]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adaptive_tangents"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "given": given,
        "fixed": _fixed,
        "label": drawing.label,
        "model_name": figures.model_name,
        "notation": _notation,
        "percent": lambda value: number(value) if value is None else f"{100 * value:.1f} %",
        "rank": lambda value: number(value) if value is None else f"{value:.1f}",
    }
    inlined = {name: _inline(figure) for name, figure in drawings.items()}
    context = {
        **results,
        "figures": inlined,
        "findings": summary_table(results),
        "structures": figures.STRUCTURES,
        **page.context(results),
    }
    return environment.get_template(page.template).render(context)


def _notation(text: str) -> Markup:
    """Set the letters of the theory: K_y with a subscript, a bar over K, K(x, x) in italics."""
    html = re.sub(r"(\w)̄", r'<i class="bar">\1</i>', str(escape(text))).replace("(x, x)", "(<i>x</i>, <i>x</i>)")
    html = re.sub(r"\b([A-Za-zθφσ])_([A-Za-z])\b", r"<i>\1</i><sub><i>\2</i></sub>", html)
    return Markup(re.sub(r"\b([A-Za-zθφσ])_(\d)\b", r"<i>\1</i><sub>\2</sub>", html))


def _claims_context(results: Results, verdict: str) -> dict[str, Any]:
    """The verdict if every claim holds, else which do not; and the command."""
    claims = results["claims"].values()
    failed = [claim["claim"] for claim in claims if not claim["holds"]]
    if failed:
        verdict = f"{len(claims) - len(failed)} of {len(claims)} claims hold; these do not: {'; '.join(failed)}."
    return {
        "verdict": verdict,
        "command": results.get("command", f"adaptive-tangents reproduce {results['experiment']}"),
    }


def _penalties_context(results: Results) -> dict[str, Any]:
    """In a line, how many of the claims the numbers bear out."""
    return _claims_context(
        results, "Small coefficients are priced as by the fixed kernel and large ones less: every claim holds."
    )


def _solvers_context(results: Results) -> dict[str, Any]:
    """In a line, what the solvers came to, or which claims do not hold; names and layers for the tables."""
    rounds = {name: found["rounds"] for name, found in results["solver"].items()}
    verdict = (
        f"One optimum, certified, after {rounds['newton']} kernel solves by Newton’s method, {rounds['anderson']} with "
        f"Anderson’s extrapolation and {rounds['alternation']} by the alternation; its coefficients are nearer to low rank "
        "than the fixed kernel’s: every claim holds."
    )
    layers = [name for name, shape in results["layers"].items() if min(shape) > 1]
    return {**_claims_context(results, verdict), "names": figures.SOLVERS, "matrices": layers}


_PAGES: dict[str, Page] = {
    "kernel-alignment": kernel_alignment.PAGE,
    "penalties": Page(
        template="penalties.html.j2",
        figures={"penalties": figures.draw_penalties},
        headline=(),
        arrays=lambda r: [
            "z",
            "v",
            "square",
            *(f"{p}.{kind}" for p in r["penalties"] for kind in ("value", "induced")),
        ],
        context=_penalties_context,
    ),
    "exact-solvers": Page(
        template="exact_solvers.html.j2",
        figures={"solvers": figures.draw_solvers, "coefficients": figures.draw_coefficients},
        headline=(),
        arrays=lambda r: [
            *(f"{solver}.{key}" for solver in r["solver"] for key in ("seconds", "solves", "objective", "temper")),
            *(f"{model}.{layer}" for model in r["rank"] for layer in r["layers"]),
        ],
        context=_solvers_context,
    ),
    "low-rank-targets": low_rank_targets.PAGE,
    "feature-change": feature_change.PAGE,
    "sample-complexity": sample_complexity.PAGE,
    "weight-spectra": weight_spectra.PAGE,
    "kernel-spectra": kernel_spectra.PAGE,
    "hard-targets": hard_targets.PAGE,
    "inspect": inspection_report.PAGE,
    "all": overview.PAGE,
}
