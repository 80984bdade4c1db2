"""The report of a run: one self-contained HTML page."""

from fastsae.report.page import ReportOptions, write_report

__all__ = ["ReportOptions", "write_report"]
