"""What the tests of the report share: settings, results, and reading a page."""

from __future__ import annotations

import json
import re

from zpipe.train.evaluation.results import Result
from zpipe.train.fit.config import TrainConfig
from zpipe.train.report import ReportConfig

COUNT = 24
LOOP = TrainConfig(epochs=1, batch_size=8, data_workers=0, device="cpu", lr=1e-3, log_every=1)
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><a href='https://example.org'>"
CONFIG = ReportConfig(gallery=20, device="cpu")


def embedded(html: str, name: str):
    return json.loads(re.search(rf'id="{name}">(.*?)</script>', html, re.S)[1])


def result(**fields):
    usual = {"study": "evaluation", "run": "vit", "model": "m", "metric": "top1", "n": 100, "value": 0.5}
    return Result(**usual | fields)


def status(page) -> int:
    return int(page.locator(".status").inner_text().split()[0])
