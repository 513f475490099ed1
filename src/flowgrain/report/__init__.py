"""Pages of results: a run, an evaluation, a comparison. Each is a single HTML file."""

from flowgrain.report.comparison import write_comparison
from flowgrain.report.run_page import write_report
from flowgrain.report.side_by_side import write_side_by_side

__all__ = ["write_comparison", "write_report", "write_side_by_side"]
