"""Runs to report on, their page, and a browser to open it in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from report_page import CONFIG, COUNT, HOSTILE, LOOP
from tiny import BODY, SIDE, scenes, store

from zpipe.schemas.atomic import write_json
from zpipe.schemas.shard_index import INDEX_NAME
from zpipe.train.evaluation.evaluate import evaluate
from zpipe.train.evaluation.operating_points import EvalConfig
from zpipe.train.fit.train_vit import VitConfig, train_vit
from zpipe.train.fit.train_zoomer import ZoomerConfig, train_zoomer
from zpipe.train.report import report


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Shards with a hostile class name, a store, and evaluated runs: both zoom factors and a plain model."""
    root = tmp_path_factory.mktemp("report")
    shards = scenes(root / "shards", COUNT, shard_size=6)
    index = json.loads((shards / INDEX_NAME).read_bytes())
    index["classes"][3] = HOSTILE
    write_json(shards / INDEX_NAME, index)
    maps = store(shards, root / "maps")
    zoomer = ZoomerConfig(num_blocks=2, width=8, image_size=SIDE, train=LOOP)
    train_zoomer(shards, maps, root / "zoomer", zoomer)
    evaluate(root / "zoomer", shards, EvalConfig(device="cpu"), maps=maps, out=root / "zoomer" / "evaluation.json")
    vit = VitConfig(model="zoomvit_tiny_patch16_224", model_args=BODY, image_size=SIDE, train=LOOP)
    train_vit(shards, root / "double", vit, zoomer=root / "zoomer")
    train_vit(shards, root / "half", replace(vit, model_args=BODY | {"zoom_factor": 0.5}), zoomer=root / "zoomer")
    train_vit(shards, root / "plain", replace(vit, model="deit_tiny_patch16_224"))
    for run, config in (
        ("double", EvalConfig(alphas=(0.4, 0.5, 0.6), device="cpu")),
        ("half", EvalConfig(alphas=(), budgets=(0, 1, 4), device="cpu")),
        ("plain", EvalConfig(device="cpu")),
    ):
        evaluate(root / run, shards, config, out=root / run / "evaluation.json")
    return root


@pytest.fixture(scope="module")
def page_file(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    error_kinds = [{"key": f"train_{n:07d}", "label": 0, "predicted": 0, "kind": "zoomer"} for n in range(0, COUNT, 2)]
    samples = data / "double" / "results" / "errors_samples.json"
    samples.parent.mkdir()
    write_json(samples, {"samples": error_kinds})
    yield report([data], out, replace(CONFIG, maps=data / "maps"))
    shutil.rmtree(samples.parent)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Chromium's sandbox does not run as root, as in containers; the page is our own.
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """Open a file; the test fails on console errors, exceptions, and requests to anything but the file."""
    troubles, contexts = [], []

    def run(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda line: troubles.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else troubles.append(request.url),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        return page

    yield run
    for context in contexts:
        context.close()
    assert troubles == []
