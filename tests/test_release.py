"""What is released: the lists of sdist and wheel, their metadata, and the wheel in an environment with nothing else."""

import email.message
import email.parser
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import adaptive_tangents as at

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "adaptive_tangents"
TOOLS = {
    "build": "build",
    "hatchling": "hatchling",
    "hatch_fancy_pypi_readme": "hatch-fancy-pypi-readme",
    "twine": "twine",
}
ADDRESS = "https://github.com/adaptive-tangents/adaptive-tangents"
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
IN_MARKDOWN, IN_HTML = re.compile(r"\]\(([^)\s]+)"), re.compile(r"<\w+\b[^>]*?\b(?:src|srcset|href)=\"([^\"]+)\"")

pytestmark = pytest.mark.xdist_group("release")  # one build for all

# Run in the empty environment: a kernel, a fit, a store, the command line, and what says that an extra is missing.
USE = """
import contextlib, importlib.metadata, importlib.util, io, json, sys
import numpy, torch
import adaptive_tangents as at

told = {"from": at.__file__, "absent": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]}
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
x, y = torch.randn(9, 4), torch.randn(9, 1)
K = at.tangent_kernel(model, x)
J = at.tangent_features(model, x).dense()
told["kernel"] = list(K.shape)
told["off"] = float((K - torch.einsum("ncp,mdp->ncmd", J, J)).abs().max() / K.abs().max())
fit = at.fit(at.tangent_features(model, x), y - model(x).detach())
told["fit"] = [fit.converged, fit.feasibility]
at.kernel_to_store(model, x, "K.zarr")
told["store"] = float((at.open_kernel("K.zarr").read() - K).abs().max() / K.abs().max())
numpy.savez("data.npz", x=x.numpy())
torch.set_default_dtype(torch.float32)
with open("factory.py", "w") as file:
    file.write("import torch\\ndef make():\\n    return torch.nn.Linear(4, 2)\\n")
(script,) = importlib.metadata.entry_points(group="console_scripts", name="adaptive-tangents")
app = script.load()
told["commands"] = {}
kernel = "kernel --data data.npz --out K2.zarr --model "
for line in ("--version", "--help", kernel + "factory.py:make", kernel + "timm:resnet18", "report .", "inspect --data d.npz"):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = app(line.split())
        except SystemExit as ended:
            status = ended.code
    told["commands"][line] = [status, out.getvalue()]
try:
    at.AdaptiveTangentRegressor()
except at.TangentError as error:
    told["estimator"] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    missing = [name for module, name in TOOLS.items() if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; they are in the extra 'dev'")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def told(wheel: Path) -> email.message.Message:
    """The wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def of_the_project() -> set[str]:
    """The files of the checkout, by git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True)
    if listing.returncode:
        pytest.skip("not a git checkout, so the files of the project are not known")
    return {name for name in listing.stdout.decode().split("\0") if name and (ROOT / name).exists()}


def test_the_sdist_holds_the_project_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held - {"PKG-INFO"} == of_the_project(), "pyproject.toml, tool.hatch.build.targets.sdist, lists what goes in"


def test_the_wheel_holds_the_package_its_license_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    about = f"adaptive_tangents-{at.__version__}.dist-info"
    files = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    own = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert held == files | own
    assert {"adaptive_tangents/py.typed", "adaptive_tangents/__init__.pyi"} < held
    assert {"adaptive_tangents/reporting/templates/base.html.j2", "adaptive_tangents/inspection/page.html.j2"} < held


def test_a_package_index_takes_both_without_a_warning(built: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_metadata_say_who_where_and_under_which_license(told: email.message.Message) -> None:
    links = dict(line.split(", ", 1) for line in told.get_all("Project-URL"))
    assert set(links) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Author"] == "The adaptive-tangents authors"
    assert told["Version"] == at.__version__


def test_version_and_date_are_the_same_wherever_they_stand() -> None:
    cited = dict(re.findall(r"^([\w-]+): (.*)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE))
    assert cited["version"] == at.__version__
    heading = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heading
    assert heading.groups() == (at.__version__, cited["date-released"])


def test_the_citation_names_the_software_and_the_paper() -> None:
    cited = pytest.importorskip("yaml").safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert (cited["title"], cited["type"], cited["license"]) == ("adaptive-tangents", "software", "Apache-2.0")
    (paper,) = cited["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["LeJeune", "Alemohammad"]
    assert paper["identifiers"][0]["value"] == "arXiv:2308.15478"


def test_links_of_the_readme_are_absolute_on_a_package_index_and_point_to_files_of_this_version(
    told: email.message.Message,
) -> None:
    shown = str(told.get_payload())
    written = (ROOT / "README.md").read_text("utf-8")
    assert CODE.findall(shown) == CODE.findall(written), "code is as it was"
    prose = CODE.sub("", shown)
    targets = IN_MARKDOWN.findall(prose) + IN_HTML.findall(prose)
    assert [each for each in targets if not each.startswith(("https://", "#"))] == []
    own = [each.partition("#")[0] for each in targets if each.startswith(f"{ADDRESS}/")]
    files = [re.fullmatch(rf"{ADDRESS}/(?:raw|blob)/v{re.escape(at.__version__)}/(.+)", each) for each in own]
    assert len(files) > 3
    assert all(found and (ROOT / found[1]).exists() for found in files)
    images = [each for each in targets if each.endswith((".png", ".svg"))]
    assert images
    assert all("/raw/v" in each for each in images), "an image is shown, so it is the file itself"


def test_every_library_that_the_package_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    declared = {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted}  # type: ignore[index]
    found = re.compile(r"^\s*(?:import|from) (\w+)", re.MULTILINE)
    imported = {name for path in PACKAGE.rglob("*.py") for name in found.findall(path.read_text("utf-8"))}
    providers = metadata.packages_distributions()
    unknown = {
        name
        for name in imported - set(sys.stdlib_module_names)
        if name in providers and not {canonical(each) for each in providers[name]} & declared
    }
    assert unknown == set()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(requirements: list[str]) -> set[str]:
    """The distributions that these requirements bring, and theirs in turn, as they are installed here."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [(Requirement(each), "") for each in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonical(requirement.name)
        if name in found and not requirement.extras:
            continue
        found.add(name)
        for wanted in metadata.requires(name) or ():
            waiting += [(Requirement(wanted), each) for each in ("", *requirement.extras)]
    return found


def empty_environment(folder: Path, wheel: Path, requirements: list[str]) -> Path:
    """The Python of a new environment: the wheel is unpacked there, and of all else there are links to what it requires."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in needed(requirements):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            assert not link.exists(), f"{name} shares the folder {top} with another"
            link.symlink_to(distribution.locate_file(top))
    return Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)})) / "python"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_the_wheel_works_with_nothing_but_the_core_dependencies(
    wheel: Path, told: email.message.Message, tmp_path: Path
) -> None:
    core = [each for each in told.get_all("Requires-Dist") if "extra ==" not in each]
    python = empty_environment(tmp_path / "env", wheel, core)
    absent = ["matplotlib", "sklearn", "transformers", "pandas", "mlxtend", "timm", "peft", "lightning", "pytest"]
    work = tmp_path / "work"
    work.mkdir()
    # Isolated: neither the checkout nor a variable of the shell leads to other modules.
    done = subprocess.run([str(python), "-I", "-c", USE, *absent], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["from"]).is_relative_to(tmp_path / "env")
    assert found["absent"] == absent
    assert found["kernel"] == [9, 1, 9, 1]
    assert max(found["off"], found["store"]) < 1e-12
    assert found["fit"][0]
    assert found["fit"][1] < 1e-8
    version, shown, kernel, timm, report, inspect = found["commands"].values()
    assert version == [0, f"adaptive-tangents {at.__version__}\n"]
    assert shown[0] == kernel[0] == 0
    assert {"reproduce", "inspect", "compare", "forecast", "kernel", "report"} <= set(re.findall(r"\w+", shown[1]))
    for status, said in (report, inspect):
        assert status == 1
        assert "pip install 'adaptive-tangents[report]'" in said
    assert timm[0] == 1
    assert "pip install 'adaptive-tangents[integrations]'" in timm[1]
    assert "pip install 'adaptive-tangents[report]'" in found["estimator"]


def test_make_dist_builds_and_checks_as_strictly_as_the_tests() -> None:
    lines = (ROOT / "Makefile").read_text("utf-8").partition("\ndist:")[2].split("\n\n")[0]
    assert "-m build" in lines
    assert "-m twine check --strict" in lines
