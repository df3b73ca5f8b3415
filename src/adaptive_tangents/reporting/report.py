"""Turn a result folder into one self-contained page, with its figures beside it."""

import base64
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.utils import missing
from markupsafe import Markup, escape

from adaptive_tangents._version import __version__
from adaptive_tangents.errors import TangentError
from adaptive_tangents.reporting import drawing
from adaptive_tangents.reporting.pages import Page, fixed, given, number
from adaptive_tangents.runs.own_files import ARRAYS_FILE, FIGURES_FOLDER, PAGE_FILE, RESULTS_FILE, check_ours
from adaptive_tangents.runs.results import Results, as_written, load_results
from adaptive_tangents.runtime.tensor_files import write_bytes

Pages = Mapping[str, Callable[[], Page]]


class Finding(NamedTuple):
    """One number of a run beside the published one and this project's earlier one, all as text."""

    label: str
    ours: str
    paper: str
    project: str


def page_of(results: Results, pages: Pages) -> Page:
    """The page for the experiment that the results name. Raises TangentError if there is none."""
    name = str(results.get("experiment"))
    if name not in pages:
        raise TangentError(
            f"report: no page for experiment {name!r}; the experiments with a page are {', '.join(pages)}"
        )
    return pages[name]()


def build_report(directory: str | os.PathLike[str], pages: Pages) -> Path:
    """Draw every figure of a result folder as PNG and SVG, write the page, and return its path.

    ``pages`` maps an experiment's name to a function that returns its page. Raises TangentError as `load_results` does, for
    an experiment without a page, and for missing arrays or numbers.
    """
    directory = Path(directory)
    results, arrays = load_results(directory)
    page, told = page_of(results, pages), _held(results)
    try:
        lacking = [name for name in page.arrays(told) if name not in arrays]
        if lacking:
            raise TangentError(f"report: {ARRAYS_FILE} lacks {', '.join(lacking)}; run the experiment again")
        # All drawings in one precision; images stay bytes.
        arrays = {name: array.astype(float) if array.dtype.kind == "f" else array for name, array in arrays.items()}
        drawings = {
            name: drawing.render(draw, name, told, arrays)
            for name, draw in page.figures.items()
            if page.applies(told, name)
        }
        html = _render(page, told, drawings, page.drawn(told, arrays))
    except _Lacking as error:
        raise TangentError(f"report: {RESULTS_FILE} is incomplete ({error}); run the experiment again") from error
    except TangentError:
        raise
    except Exception as error:
        if as_written(directory) and told.get("versions", {}).get("adaptive_tangents") == __version__:
            raise  # a fault of the page, not of the results
        raise TangentError(
            f"report: {directory} was changed since it was written, or by an earlier version, and cannot be drawn "
            f"({type(error).__name__}: {error}); run the experiment again"
        ) from error
    check_ours("report", directory, drawings)
    for name, figure in drawings.items():
        write_bytes(directory / FIGURES_FOLDER / f"{name}.svg", figure.svg.encode("utf-8", "backslashreplace"))
        write_bytes(directory / FIGURES_FOLDER / f"{name}.png", figure.png)
    write_bytes(directory / PAGE_FILE, html.encode("utf-8", "backslashreplace"))
    return directory / PAGE_FILE


def summary_table(results: Results, page: Page) -> list[Finding]:
    """The headline numbers and every number with a reference, as rows (label, ours, paper, project reference)."""
    metrics, reference = results.get("metrics", {}), results.get("reference", {})
    headline = [f"{target}.{key}" for target in results.get("targets", {}) for key in page.headline]
    return [
        Finding(
            _label(key, page),
            number(metrics.get(key)),
            *(given(reference.get(key, {}).get(source)) for source in ("paper", "project")),
        )
        for key in dict.fromkeys((*headline, *reference))
    ]


class _Lacking(KeyError):
    """The results lack a key that their page needs. Any other KeyError is a bug of the page."""

    __str__ = Exception.__str__


class _Held(dict[str, Any]):
    """A mapping from the results: its missing keys raise `_Lacking`, unlike those of a page's own mappings."""

    def __missing__(self, key: str) -> Any:
        raise _Lacking(repr(key))


class _Undefined(jinja2.StrictUndefined):
    """A name that a template does not find: `_Lacking` if it was looked up in the results or at top level."""

    def __init__(
        self, hint: str | None = None, obj: Any = missing, name: str | None = None, exc: Any = jinja2.UndefinedError
    ) -> None:
        fault: Any = _Lacking if obj is missing or isinstance(obj, _Held) else exc
        super().__init__(hint, obj, name, fault)


def _held(value: Any) -> Any:
    """The results, with every mapping a `_Held`."""
    if isinstance(value, Mapping):
        return _Held({key: _held(item) for key, item in value.items()})
    return [_held(item) for item in value] if isinstance(value, list) else value


def _label(key: str, page: Page) -> str:
    target, _, rest = key.partition(".")
    return f"{drawing.label(target)}: {page.labels.get(rest, drawing.label(rest.replace('.', ' ')))}"


def _inline(figure: drawing.Drawing) -> Markup:
    """The figure for the page: vector shapes take the page's colors; pixels go in as PNG, which is smaller."""
    if "<image" in figure.svg:
        return Markup('<img class="pixels" alt="" src="data:image/png;base64,{}">').format(
            base64.b64encode(figure.png).decode()
        )
    text = figure.svg[figure.svg.index("<svg") :]
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text)
    names = {drawing.INK: "ink", drawing.MUTED: "muted", drawing.RULE: "rule", drawing.PAPER: "paper"}
    return Markup(re.sub("|".join(names), lambda match: f"var(--{names[match[0]]})", text))


def _studies(names: Sequence[str]) -> list[str]:
    """The studies that claims named study.claim belong to."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _render(page: Page, results: Results, drawings: Mapping[str, drawing.Drawing], drawn: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adaptive_tangents", ""),
        autoescape=True,
        undefined=_Undefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[[Any], Any]] = {
        "number": number,
        "given": given,
        "fixed": fixed,
        "label": drawing.label,
        "notation": _notation,
        "studies": _studies,
        "percent": lambda value: number(value) if value is None else f"{100 * value:.1f} %",
        "rank": lambda value: number(value) if value is None else f"{value:.1f}",
    }
    environment.filters |= filters
    inlined = {name: _inline(figure) for name, figure in drawings.items()}
    context = {
        **results,
        "figures": inlined,
        "findings": summary_table(results, page),
        **page.context(results),
        **drawn,
    }
    return environment.get_template(page.template).render(context)


def _notation(text: str) -> Markup:
    """Typeset mathematical symbols: K_y with a subscript, a bar over K, K(x, x) in italics."""
    safe = re.sub(r"([A-Za-zθφσ])₀", r"\1_0", str(escape(text)))  # markup stays markup
    html = re.sub(r"(\w)̄", r'<i class="bar">\1</i>', safe).replace("(x, x)", "(<i>x</i>, <i>x</i>)")
    html = re.sub(r"\b([A-Za-zθφσ])_([A-Za-z])\b", r"<i>\1</i><sub><i>\2</i></sub>", html)
    return Markup(re.sub(r"\b([A-Za-zθφσ])_(\d)\b", r"<i>\1</i><sub>\2</sub>", html))
