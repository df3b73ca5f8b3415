"""The pages of all studies and of their overview, by name. A page is imported when it is used."""

from collections.abc import Callable

from adaptive_tangents.experiments.overview_page import PAGE as OVERVIEW
from adaptive_tangents.experiments.registry import STUDIES
from adaptive_tangents.reporting.pages import Page
from adaptive_tangents.runs.summary import NAME as NAME_OF_ALL

PAGES: dict[str, Callable[[], Page]] = {study.name: study.page for study in STUDIES.values()}
PAGES[NAME_OF_ALL] = lambda: OVERVIEW
