"""The rules of the house, read off the source: what imports what, how long a file gets, what it must not name."""

import ast
import importlib
import inspect
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

import adaptive_tangents as at
from adaptive_tangents.data import Dataset, normalize_digits

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "adaptive_tangents"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Data flows downward: a module imports only from those before it.
ORDER = (
    "errors",
    "memory",
    "products",
    "files",
    "transforms",
    "projections",
    "summands",
    "stores",
    "locks",
    "processes",
    "blocks",
    "contraction",
    "features",
    "layers",
    "inputs",
    "tiled",
    "views",
    "recording",
    "operations",
    "derivatives",
    "sources",
    "passes",
    "capture",
    "sketches",
    "sketch_files",
    "path",
    "penalty_checks",
    "search",
    "sharing",
    "induced",
    "penalties",
    "structures",
    "groups",
    "spectral",
    "modes",
    "mixed",
    "subspaces",
    "proximal",
    "losses",
    "goals",
    "systems",
    "constraints",
    "operators",
    "regression",
    "model",
    "newton",
    "alternation",
    "alignment",
    "adaptation",
    "fits",
    "certificates",
    "kernel_model",
    "kernel_fits",
    "solvers",
    "choosing",
    "factors",
    "forward_mode",
    "modules",
    "planning",
    "streams",
    "tiling",
    "identities",
    "kernels",
    "storing",
    "explain",
    "estimators",
    "tracking",
    "data_files",
    "data",
    "experiments",
    "loading",
    "inspection",
    "drawing",
    "pages",
    "figures",
    "experiment_pages",
    "inspection_figures",
    "inspection_report",
    "report",
    "overview",
    "cli",
    "__main__",
)

# A dependency that only some modules may name; everything else must work without importing it.
ONLY_IN = {
    "sklearn": {"estimators", "data"},
    "mlxtend": {"data"},
    "matplotlib": {"drawing", "figures", "experiment_pages", "inspection_figures"},
    "jinja2": {"report"},
    "typer": {"cli"},
    "rich": {"cli"},
    "zarr": {"stores"},
    "xrfm": {"experiments"},
}
LAZY_IN = {"data": {"sklearn", "mlxtend"}, "stores": {"zarr"}, "experiments": {"xrfm"}}

LONGEST = 450
MACHINE_PATH = re.compile(rb"(?<![\w.~})/-])/(?:work|root|opt|home)/")


def component(path: Path) -> str:
    """`path` for path.py, `experiments` for anything in that folder, `__init__` for the map of the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def dotted(path: Path) -> list[str]:
    """The package that a file's relative imports start from."""
    return ["adaptive_tangents", *path.relative_to(PACKAGE).parent.parts]


def imported(path: Path, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """Every module that a file imports, anywhere in it, with the imported name appended where it may be a module."""
    names = set()
    for node in nodes or ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = dotted(path)[: len(dotted(path)) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imported_at_module_level(path: Path) -> set[str]:
    """What importing a file imports: all but the bodies of its functions."""

    def nodes(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from nodes(child)

    return imported(path, nodes(ast.parse(path.read_text("utf-8"), str(path))))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_is_listed_in_the_order(path: Path) -> None:
    place = component(path)
    assert place in {"__init__", *ORDER}, (
        f"{name_of(path)} has no place in the order of modules: list {place!r} in ORDER of tests/test_architecture.py, "
        f"after all it imports and before all that import it, and in docs/architecture.md"
    )


@pytest.mark.parametrize("path", [p for p in SOURCES if component(p) != "__init__"], ids=name_of)
def test_a_module_imports_only_from_those_before_it(path: Path) -> None:
    place = component(path)
    before = ORDER[: ORDER.index(place)] if place in ORDER else ()
    for module in imported(path):
        package, *rest = module.split(".")
        if package != "adaptive_tangents":
            continue
        assert rest, f"{name_of(path)} imports the whole package; import from the module that defines the name"
        if rest[0] == "__version__":
            continue
        # Within a folder such as experiments, files may share helpers.
        assert rest[0] in {*before, *([place] if path.parent != PACKAGE else [])}, (
            f"{name_of(path)} imports {module}, which does not come before {place!r} in the order of modules"
        )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_heavy_dependency_is_named_only_where_it_belongs(path: Path) -> None:
    for module in imported(path):
        top = module.partition(".")[0]
        assert component(path) in ONLY_IN.get(top, {component(path)}), (
            f"{name_of(path)} imports {top}, which only {' and '.join(sorted(ONLY_IN[top]))} may"
        )


@pytest.mark.parametrize("path", [p for p in SOURCES if component(p) in LAZY_IN], ids=name_of)
def test_a_dependency_used_in_one_function_is_imported_there(path: Path) -> None:
    eager = {module.partition(".")[0] for module in imported_at_module_level(path)} & LAZY_IN[component(path)]
    assert not eager, f"{name_of(path)} imports {sorted(eager)} when it is itself imported; move that into the function"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_source_file_is_too_long(path: Path) -> None:
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
    """The docstring somebody wrote for it: not one inherited from a base, nor the signature a dataclass makes up."""
    if not inspect.isclass(value):
        return inspect.getdoc(value) if callable(value) or inspect.ismodule(value) else None
    written = vars(value).get("__doc__")
    return None if written is None or written.startswith(f"{value.__name__}(") else written


@pytest.mark.parametrize("name", getattr(at, "__all__", ["__all__"]))
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(at, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+\w*", value)
    else:
        assert (own_docstring(value) or "").strip(), f"adaptive_tangents.{name} has no docstring of its own"


def test_the_public_names_are_those_the_map_imports() -> None:
    assert len(set(at.__all__)) == len(at.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    names = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert {name for name in names if not name.startswith("_")} == set(at.__all__) - {"__version__"}


# what the tests themselves rely on


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_is_imported_through_the_shape_checks(path: Path) -> None:
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
