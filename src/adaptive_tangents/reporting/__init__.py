"""Pages that tell a run: drawing, what pages are made of, and the report that puts them together. Nothing is measured here.

A page itself belongs to what it tells, `inspection` or a study; the caller hands it in.
"""

from adaptive_tangents.reporting.pages import Page, Section, Shown, Story, Table, told
from adaptive_tangents.reporting.report import build_report, page_of, summary_table

__all__ = ["Page", "Section", "Shown", "Story", "Table", "build_report", "page_of", "summary_table", "told"]
