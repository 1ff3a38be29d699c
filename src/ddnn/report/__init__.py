"""Comparisons turned into what a person reads: a Markdown table, a self-contained HTML page, figures.

comparison.py   comparison.json and the training curves of its runs, checked
summary.py      means, deviations, paired differences with their intervals, relative costs
sentences.py    verdicts, the price and what is missing, in words
tables.py       the same in tables; `markdown`
figures.py      the same in figures
output.py       `write`: the files
"""

from ddnn.report.output import write
from ddnn.report.summary import summarise
from ddnn.report.tables import markdown

__all__ = ["markdown", "summarise", "write"]
