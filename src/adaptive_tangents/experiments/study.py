"""What a study is and what can be asked of it. Its run and its page are imported only when used."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import adaptive_tangents.reporting.pages
    import adaptive_tangents.runs.record

T = TypeVar("T")
Size = Literal["quick", "standard", "full"]


@dataclass(frozen=True)
class Asked:
    """What the command line asks of a study; None leaves a number to the study, which uses the fields it needs."""

    size: Size = "standard"
    data: str = "mnist5k"
    data_dir: str | None = None
    seed: int = 0
    seeds: int | None = None
    samples: int | None = None
    epochs: int | None = None

    @property
    def source(self) -> dict[str, Any]:
        """The data source and the seed, under the names of config fields."""
        return {"data": self.data, "data_dir": self.data_dir, "seed": self.seed}

    def sized(self, standard: T, *, quick: T | None = None, full: T | None = None) -> T:
        """The value for the requested size, or ``standard`` if that size has none.

        >>> Asked(size="quick").sized(5, quick=1), Asked(size="full").sized(5, quick=1)
        (1, 5)
        """
        own = {"quick": quick, "standard": standard, "full": full}[self.size]
        return standard if own is None else own


@dataclass(frozen=True)
class Study:
    """A study, listed in ``STUDIES`` of its folder's ``__init__``.

    Args:
        name: The study's name on the command line and the name of its result folder.
        about: The question it asks, in one line.
        place: Its position in the order of presentation.
        minutes: Duration of a full run on two cores; when several run at once, the longest starts first.
        package: The folder's package, ``__name__``.
        measured_in: Module of the package with ``configured(asked)`` and ``run(config, device=, progress=, units=)``.
        told_in: Module of the package with the page, ``PAGE``.
    """

    name: str
    about: str
    place: int
    minutes: float
    package: str
    measured_in: str = "run"
    told_in: str = "page"

    def configured(self, asked: Asked) -> Any:
        """The settings for what the command line asked."""
        return self._module(self.measured_in).configured(asked)

    def run(self, config: Any, **keywords: Any) -> "adaptive_tangents.runs.record.RunResult":
        """Measure everything. Takes ``device``, ``progress`` and the ``units`` that keep the run's parts."""
        found: adaptive_tangents.runs.record.RunResult = self._module(self.measured_in).run(config, **keywords)
        return found

    def page(self) -> "adaptive_tangents.reporting.pages.Page":
        """The page for its results."""
        found: adaptive_tangents.reporting.pages.Page = self._module(self.told_in).PAGE
        return found

    def _module(self, name: str) -> Any:
        return import_module(f"{self.package}.{name}")
