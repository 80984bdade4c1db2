"""The report of a run: one HTML page that needs nothing but itself."""

from fastsae.report.page import ReportOptions, write_report

__all__ = ["ReportOptions", "write_report"]
