"""The rules of the code base, checked on the source: imports between modules, file lengths, forbidden names."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

import adaptive_tangents as at
from adaptive_tangents.datasets.images import Dataset, normalize_digits

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "adaptive_tangents"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A wing imports only from wings before it, and there are no cycles within a wing.
WINGS = (
    "runtime",
    "linalg",
    "features",
    "capture",
    "penalties",
    "structures",
    "sketching",
    "kernels",
    "storage",
    "measures",
    "solvers",
    "nn",
    "datasets",
    "loading",
    "runs",
    "reporting",
    "forecasting",
    "inspection",
    "tracking",
    "integrations",
    "experiments",
    "commands",
)
# Flat modules: those that every wing may import, and those that may import every wing.
BELOW = ("_version", "errors", "checks")
ABOVE = ("estimators", "cli", "__main__")
MOST_FLAT = 12

# Dependencies that only some modules may import; everything else must work without them.
ONLY_IN = {
    "sklearn": {"datasets.images", "estimators"},
    "mlxtend": {"datasets.images"},
    "matplotlib": {
        "runtime.figures",
        "runtime.notebook_figure",
        "features.tangent_features",
        "measures.explain",
        "solvers.results",
        "reporting",
        "experiments",
        "inspection",
        "forecasting",
        "tracking",
    },
    "jinja2": {"reporting.report"},
    "typer": {"cli", "commands"},
    "rich": {"commands", "runtime.progress"},
    "threadpoolctl": {"runs.parallel"},
    "zarr": {"storage.store"},
    "xrfm": {"experiments"},
    "pandas": {"inspection.rows", "tracking.history", "tracking.tracker"},
}
LAZY = {"sklearn", "mlxtend", "threadpoolctl", "zarr", "xrfm"}  # imported by the function that needs them
SUBCLASSES = {
    "estimators": "sklearn"
}  # except where classes are subclasses; the front door imports the module when asked for

LONGEST = 450
MACHINE_PATH = re.compile(rb"(?<![\w.~})/-])/(?:work|root|opt|home)/")


def module_of(path: Path) -> str:
    """`features.blocks` for features/blocks.py, `features` for that wing's `__init__`, and `` for the package's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def wing_of(module: str) -> str:
    return module.partition(".")[0]


def dotted(path: Path) -> list[str]:
    """The package that a file's relative imports start from."""
    return ["adaptive_tangents", *path.relative_to(PACKAGE).parent.parts]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere, with the imported name appended if it may be a module."""
    return frozenset(imports(path, ast.walk(parsed(path))))


def imports(path: Path, nodes: Iterator[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = dotted(path)[: len(dotted(path)) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imported_at_module_level(path: Path) -> set[str]:
    """Modules imported when the file is imported: all except those in function bodies."""

    def nodes(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from nodes(child)

    return imports(path, nodes(parsed(path)))


MODULES = {module_of(source) for source in SOURCES}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def internal(path: Path) -> set[str]:
    """The modules of the package that a file imports from."""
    found = set()
    for module in imported(path):
        package, _, rest = module.partition(".")
        if package == "adaptive_tangents":
            assert rest, f"{name_of(path)} imports the whole package; import from the module that defines the name"
            found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return found


def test_every_file_has_its_place_in_the_house() -> None:
    flat = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert flat <= {*BELOW, *ABOVE}, f"{flat - {*BELOW, *ABOVE}}: which wing do they belong to?"
    assert len(flat) < MOST_FLAT
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(WINGS), "list a new wing in WINGS, after all it imports, and in docs/architecture.md"


def test_wings_import_one_way() -> None:
    order = ("", *BELOW, *WINGS, *ABOVE)
    for path in SOURCES:
        place = wing_of(module_of(path))
        for module in internal(path) if place else ():
            wing = wing_of(module)
            assert wing == place or order.index(wing) < order.index(place), (
                f"{name_of(path)} imports {module}, which does not come before {place!r} in the order of wings"
            )


def test_no_wing_imports_in_a_circle() -> None:
    uses = {module_of(path): internal(path) for path in SOURCES if path.name != "__init__.py"}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle of imports: {' → '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for other in uses.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in uses:
        visit(module, ())


def test_a_wing_says_what_is_in_it_and_hands_on_names_of_its_own() -> None:
    for wing in WINGS:
        path = PACKAGE / wing / "__init__.py"
        assert ast.get_docstring(parsed(path)), f"{wing}/__init__.py does not say what is in it"
        assert all(wing_of(module) == wing for module in internal(path)), f"{wing} hands on names of another wing"


def test_the_map_shows_every_wing_and_every_module_and_names_nothing_else() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    drawing = page.partition("```mermaid")[2].partition("```")[0]
    assert set(WINGS) <= set(re.findall(r"\w+", drawing)), "a wing is not on the drawing"
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert tuple(name for name in rows if name in WINGS) == WINGS, "the table of wings is not in their order"
    for wing in WINGS:
        modules = {path.stem for path in (PACKAGE / wing).glob("*.py")} - {"__init__"}
        named = set(re.findall(r"`(\w+)`", rows[wing]))
        assert named <= modules, f"the map names {named - modules} in {wing}, which are not there"
        if wing != "experiments":
            assert modules <= named, f"the map lacks {modules - named} in {wing}"
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page):
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), f"the map names {name}, which is not there"


def test_a_heavy_dependency_is_named_only_where_it_belongs() -> None:
    for path, name in [(source, name) for source in SOURCES for name in imported(source)]:
        top, module = name.partition(".")[0], module_of(path)
        homes = ONLY_IN.get(top, {module})
        assert any(f"{module}.".startswith(f"{home}.") for home in homes), (
            f"{name_of(path)} imports {top}, which only {' and '.join(sorted(homes))} may"
        )


def test_a_dependency_used_in_one_function_is_imported_there() -> None:
    for path in SOURCES:
        eager = {module.partition(".")[0] for module in imported_at_module_level(path)} & LAZY
        eager -= {SUBCLASSES.get(module_of(path))}
        assert not eager, (
            f"{name_of(path)} imports {sorted(eager)} when it is itself imported; move that into the function"
        )


def test_only_what_runs_as_a_program_changes_the_filters_of_warnings() -> None:
    # They belong to the process: where threads silence warnings at a time, they may stay silent.
    changing = re.compile(r"catch_warnings|simplefilter|filterwarnings")
    found = [name_of(path) for path in SOURCES if changing.search(path.read_text("utf-8"))]
    assert [name for name in found if not name.startswith(("commands/", "reporting/"))] == []


MAKERS = {
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


def test_no_tensor_is_made_on_the_default_device() -> None:
    # It is the user's to set, and may be none that computes. Experiments set up a process of their own.
    made = [
        f"{name_of(path)}:{call.lineno} {ast.unparse(call)}"
        for path in SOURCES
        if not name_of(path).startswith(("experiments/", "datasets/"))
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in MAKERS
        if ast.unparse(call.func.value) == "torch" and not {"device", None} & {word.arg for word in call.keywords}
    ]
    assert not made, "\n".join(["say on which device:", *made])


def test_no_source_file_is_too_long() -> None:
    for path in SOURCES:
        lines = len(path.read_text("utf-8").splitlines())
        assert lines <= LONGEST, f"{name_of(path)} has {lines} lines, more than {LONGEST}; find the cut in it"


def test_no_file_names_a_path_of_one_machine() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout, so the files of the project are not known")
    files = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    assert Path(__file__).resolve() in [file.resolve() for file in files]
    named = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip().decode(errors='replace')}"
        for file in files
        if file.is_file()
        for number, line in enumerate(file.read_bytes().splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not named, "\n".join(["absolute paths of a machine:", *named])


@pytest.mark.parametrize("folder", ["work", "root", "opt", "home"])
def test_the_search_for_machine_paths_finds_them_and_nothing_else(folder: str) -> None:
    for before in (b"", b'"', b" ", b"=", b":", b"file://"[:5], b"(", b"`"):
        assert MACHINE_PATH.search(before + f"/{folder}/x".encode()), before
    for line in (
        f"https://host.org/{folder}/x",
        f"src/{folder}/x",
        f"$HOME/{folder}",
        f"../{folder}/x",
        f"~/{folder}/x",
    ):
        assert not MACHINE_PATH.search(line.encode()), line


# the public names


def own_docstring(value: object) -> str | None:
    """The object's own docstring, neither inherited nor generated by a dataclass."""
    if not inspect.isclass(value):
        return inspect.getdoc(value) if callable(value) or inspect.ismodule(value) else None
    written = vars(value).get("__doc__")
    return None if written is None or written.startswith(f"{value.__name__}(") else written


def test_every_public_name_has_a_docstring() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", at.__version__)
    for name in sorted({*at.__all__} - {"__version__"}):
        value = getattr(at, name)
        assert (own_docstring(value) or "").strip(), f"adaptive_tangents.{name} has no docstring of its own"


def test_the_public_names_are_those_of_the_stub_and_few() -> None:
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text("utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.name == alias.asname for node in found for alias in node.names), "a stub hands on names by `as`"
    assert {alias.name for node in found if node.module is None for alias in node.names} <= set(WINGS)
    assert at.__all__ == sorted(alias.name for node in found if node.module is not None for alias in node.names)
    assert len(dir(at)) <= 50
    assert set(dir(at)) == {*at.__all__, "__version__"}


def test_public_results_that_hold_tensors_are_compared_by_identity() -> None:
    """Tensors have no one truth value, so that comparing fields would fail in ``==``, ``in``, ``index`` and sets."""
    found = set()
    for module in [at, *(importlib.import_module(f"adaptive_tangents.{wing}") for wing in WINGS)]:
        for name in getattr(module, "__all__", ()):
            kind = getattr(module, name)
            if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
                held = [str(field.type) for field in dataclasses.fields(kind)]
                if any("Tensor" in each or "TangentFeatures" in each for each in held):
                    found.add(name)
                    assert kind.__eq__ is object.__eq__, f"{name}: give its dataclass eq=False"
                    assert kind.__hash__ is object.__hash__
    assert {"Fit", "KernelFit", "Decomposition", "LowRank"} <= found


def test_importing_the_package_and_asking_the_command_line_for_help_loads_nothing_heavy() -> None:
    script = """
import sys, adaptive_tangents
from adaptive_tangents.cli import app
for asked in (["--help"], ["reproduce", "--help"], ["--version"]):
    try:
        app(asked)
    except SystemExit:
        pass
print([name for name in ("torch", "numpy", "scipy", "matplotlib", "sklearn", "zarr") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# In a new process: names, then the same names where the libraries that they need are missing.
USED = """
import sys, adaptive_tangents as at
for name in dir(at):
    if not name.startswith("AdaptiveTangent"):  # subclasses of scikit-learn's
        getattr(at, name)
at.integrations.HuggingFaceTracker, at.integrations.LightningTracker
heavy = ("scipy.optimize", "scipy.sparse", "scipy.linalg", "matplotlib", "jinja2", "sklearn", "mlxtend", "zarr", "typer",
         "transformers", "lightning", "pytorch_lightning", "pandas")
print([name for name in heavy if name in sys.modules])
for name in ("transformers", "lightning", "lightning.pytorch", "pytorch_lightning", "sklearn", "sklearn.base"):
    sys.modules[name] = None
for name in ("integrations.HuggingFaceTracker", "integrations.LightningTracker", "AdaptiveTangentRegressor",
             "AdaptiveTangentClassifier"):
    try:
        eval(f"at.{name}()")
    except at.TangentError as error:
        print(error)
"""


def test_using_every_public_name_loads_nothing_heavy_and_where_a_library_is_missing_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", USED], capture_output=True, text=True, check=True)
    loaded, *said = done.stdout.splitlines()
    assert loaded == "[]", "nothing of scipy, of reports and of trainers"
    extra = (
        "pip install 'adaptive-tangents[integrations]', or call record(step) of an at.Tracker in the loop of training"
    )
    learn = "scikit-learn is not installed; pip install 'adaptive-tangents[report]' installs it"
    assert said == [
        f"HuggingFaceTracker: transformers is not installed; {extra}",
        f"LightningTracker: lightning is not installed; {extra}",
        f"AdaptiveTangentRegressor: {learn}",
        f"AdaptiveTangentClassifier: {learn}",
    ]


# helpers of the tests


def test_every_module_is_imported_through_the_shape_checks() -> None:
    for path in SOURCES:
        name = ".".join([*dotted(path), path.stem]).removesuffix(".__init__")
        assert type(importlib.import_module(name).__spec__.loader).__module__.startswith("jaxtyping."), name


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 28, 28), torch.zeros(2, 28, 27, dtype=torch.uint8), torch.zeros(2, 784, dtype=torch.uint8)],
    ids=["float", "28 x 27", "flat"],
)
def test_shapes_and_dtypes_are_checked_at_run_time_under_the_tests(images: torch.Tensor) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        normalize_digits(images)


def test_fields_of_one_dataclass_must_agree_in_shape_under_the_tests() -> None:
    images, labels = torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(jaxtyping.TypeCheckError):
        Dataset("odd", images, labels, images, labels[:3], "made up")


def test_a_warning_of_the_library_is_an_error_under_the_tests() -> None:
    with pytest.raises(at.TangentWarning):
        warnings.warn("a fit that did not converge", at.TangentWarning, stacklevel=1)


def test_the_default_dtype_is_left_alone() -> None:
    assert torch.get_default_dtype() == torch.float32
