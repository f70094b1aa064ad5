"""The report of an experiment: one self-contained HTML page, and its tables as CSV, Parquet and LaTeX."""

from nnunet_deform.comparison.report.build import build_report

__all__ = ["build_report"]
