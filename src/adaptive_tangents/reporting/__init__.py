"""Report pages: drawing, the building blocks of pages, and the report that assembles them. Nothing is measured here.

Each page is defined by what it reports, `inspection` or a study; the caller passes it in.
"""

from adaptive_tangents.reporting.pages import Page, Section, Shown, Story, Table, told
from adaptive_tangents.reporting.report import build_report, page_of, summary_table

__all__ = ["Page", "Section", "Shown", "Story", "Table", "build_report", "page_of", "summary_table", "told"]
