"""The page a person looks at: report.html of a run, self-contained."""

from flowgrain.report.page import write_report

__all__ = ["write_report"]
