"""One self-contained page over finished runs: curves, tables, and a gallery of what the models looked at.

runs.py     what runs and studies left on disk, as tidy results
figures.py  tidy results -> curves, histograms, tables, headline
gallery.py  the models on a few samples of a data set
page.py     all of it as one HTML file
page.html, page.css, .js files: the page itself, plain and without a build step
"""

from zpipe.train.report.page import ReportConfig, report

__all__ = ["ReportConfig", "report"]
