"""One self-contained page about finished runs: curves, tables, and a gallery of what the models looked at.

runs.py     files of runs and studies -> tidy results
points.py   tidy results -> points, each with all metrics of one setting
figures.py  points -> curves and histograms
tables.py   points -> tables and the headline
judged.py   tests of maps -> tables and plots
gallery.py  the answers of the models to a few samples
page.py     all of this -> one HTML file
page.html, page.css and the scripts are the page itself, without a build step
"""

from zpipe.train.report.page import ReportConfig, report

__all__ = ["ReportConfig", "report"]
