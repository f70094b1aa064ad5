"""The report of a comparison: one self-contained HTML page, and its tables as CSV, Parquet and LaTeX."""

from nnunet_deform.comparison.report.build import build_archive_report, build_report, build_results_report, write_report
from nnunet_deform.comparison.report.content import DatasetContent, Provenance, ReportContent, Volumes
from nnunet_deform.comparison.report.pictures import read_volumes

__all__ = [
    "DatasetContent",
    "Provenance",
    "ReportContent",
    "Volumes",
    "build_archive_report",
    "build_report",
    "build_results_report",
    "read_volumes",
    "write_report",
]
