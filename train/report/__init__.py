"""One self-contained page over finished runs: curves, tables, and a gallery of what the models looked at.

runs.py     what runs and studies left on disk, as tidy results
points.py   tidy results -> points, each with all metrics of one setting
figures.py  points -> curves and histograms
tables.py   points -> tables and the headline
gallery.py  the models on a few samples of a data set
page.py     all of it as one HTML file
page.html, page.css, .js files: the page itself, plain and without a build step
"""

from zpipe.train.report.page import ReportConfig, report

__all__ = ["ReportConfig", "report"]
