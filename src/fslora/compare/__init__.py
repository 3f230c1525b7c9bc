"""Comparisons: any set of methods on the same model, data, partition, fleet, seeds and budget."""

from fslora.compare.execute import is_comparison, resume, start, write_report
from fslora.compare.ledger import Ledger
from fslora.compare.options import parse_budget, parse_grid, with_options
from fslora.compare.plan import BASELINES, make_plan

__all__ = [
    "BASELINES",
    "Ledger",
    "is_comparison",
    "make_plan",
    "parse_budget",
    "parse_grid",
    "resume",
    "start",
    "with_options",
    "write_report",
]
