"""What runs gave: a table on the terminal, or one HTML file: `python -m pipeline.report [--html report.html [EXPERIMENT ...]]`.

table        the held-out results and costs of the last run    experiment   the files of a run, here or in DVC's cache
answers      predictions.parquet summed up, rows to show       gallery      held-out pictures with what was answered
charts       curves and intervals as Vega-Lite                 page         all of it in one file
"""

from pipeline.report.table import read_metrics, tables

__all__ = ["read_metrics", "tables"]
