"""The report layer: run and comparison folders in; tables, figures and one page out. It never loads a model or data."""

from fslora.report.comparison_page import write_comparison
from fslora.report.comparison_tables import comparison_table
from fslora.report.figures import (
    Drawn,
    bytes_figure,
    client_scores_figure,
    coverage_figure,
    draw_all,
    loss_figure,
    partition_figure,
    score_figure,
)
from fslora.report.headline import Headline, headline
from fslora.report.page import write_page
from fslora.report.read import DataRecord, RunRecord, parse_data, read_run
from fslora.report.style import save
from fslora.report.tables import (
    Table,
    class_table,
    clients_table,
    closing_table,
    dropped_table,
    fleet_table,
    statistics_table,
)

__all__ = [
    "DataRecord",
    "Drawn",
    "Headline",
    "RunRecord",
    "Table",
    "bytes_figure",
    "class_table",
    "client_scores_figure",
    "clients_table",
    "closing_table",
    "comparison_table",
    "coverage_figure",
    "draw_all",
    "dropped_table",
    "fleet_table",
    "headline",
    "loss_figure",
    "parse_data",
    "partition_figure",
    "read_run",
    "save",
    "score_figure",
    "statistics_table",
    "write_comparison",
    "write_page",
]
