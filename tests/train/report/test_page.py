"""The page: one safe file that works in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import plotly.graph_objects
import pytest
from report_page import CONFIG, HOSTILE, embedded, result, status

from zpipe.train.report import report
from zpipe.train.report.figures import curves
from zpipe.train.report.page import describe, embedded_json, render
from zpipe.train.report.points import points
from zpipe.train.report.runs import gather

pytestmark = pytest.mark.usefixtures("one_thread")


# -- one safe file -----------------------------------------------------------------------------------------------------


class _Reader(HTMLParser):
    """Collects the attributes of all elements and the text of the scripts."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self._script = [], [], None

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None

    def handle_data(self, text):
        if self._script is not None and self._script.get("type") is None:
            self.scripts.append(text)

    def handle_endtag(self, tag):
        self._script = None


def test_the_page_reaches_for_nothing_and_runs_only_its_own_scripts(page_file):
    html = page_file.read_text()
    reader = _Reader()
    reader.feed(html)
    for tag, attributes in reader.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert re.match(r"#|data:,$", attributes.get(name, "#")), (tag, attributes)
    (policy,) = [found["content"] for tag, found in reader.elements if found.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy and "unsafe-eval" not in policy and "connect-src" not in policy
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in reader.scripts]
    assert len(digests) == 2 and all(f"'sha256-{digest}'" in policy for digest in digests)
    ours = render({}, None).replace(reader.scripts[0], "")
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", ours)
    assert HOSTILE not in html and "<img src=x" not in html


def test_the_page_is_made_where_the_locale_knows_only_ascii():
    """Its files contain arrows and Greek letters, and Python's default encoding is that of the locale."""
    command = "from zpipe.train.report.page import render; print(ascii(render({}, None)))"
    settings = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", command], env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip() == ascii(render({}, None))


def test_embedded_json_ends_no_script():
    text = embedded_json({HOSTILE: "<!--<script>\u2028\ud800"})
    assert "<" not in text and json.loads(text) == {HOSTILE: "<!--<script>\u2028\ud800"}
    text.encode("ascii")


def test_names_are_shown_with_what_would_not_be_seen():
    about = {"runs": ["a\u202eb", "c\x1b[31m"], "n": 1.5, "notes": []}
    shown = json.loads(re.search(r'id="about-data">(.*?)</script>', render(about, None))[1])
    assert shown == about | {"runs": [r"a\u202eb", r"c\x1b[31m"]}


def test_the_same_inputs_give_the_same_bytes(data, page_file, tmp_path):
    again = report([data], tmp_path, replace(CONFIG, maps=data / "maps"))
    assert again.read_bytes() == page_file.read_bytes()


def test_figures_are_what_plotly_takes(page_file):
    about = embedded(page_file.read_text(), "about-data")
    drawn = [figure for part in about["figures"].values() for figure in part]
    assert len(drawn) >= 7
    for figure in drawn:
        traces = [{k: v for k, v in trace.items() if k not in ("series", "dashed")} for trace in figure["data"]]
        plotly.graph_objects.Figure(data=traces, layout=figure["layout"])
        tables_there = {table["id"] for part in about["tables"].values() for table in part}
        assert figure["table"] in tables_there  # the text alternative


# -- in a browser ------------------------------------------------------------------------------------------------------


def wait_until(page, expression):
    """Wait until an expression is true. Playwright's own function uses eval, which the policy of the page forbids."""
    for _ in range(500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"never came true: {expression}")


def test_by_keyboard_alone(page_file, open_page):
    page = open_page(page_file)
    page.locator("#reset").focus()
    page.keyboard.press("Tab")
    at = "document.activeElement.dataset.at"
    assert page.evaluate(at) == "0"
    for key, expected in (
        ("ArrowDown", "1"),
        ("ArrowRight", "2"),
        ("ArrowUp", "1"),
        ("End", "19"),
        ("Home", "0"),
        ("ArrowUp", "0"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(at) == expected, key
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    dialog = page.locator("#enlarged")
    assert dialog.is_visible() and dialog.locator("canvas").count() == 4
    key = dialog.locator(".key").inner_text()
    page.keyboard.press("ArrowRight")
    assert dialog.locator(".key").inner_text() != key and "3 of 20" in dialog.locator(".key").inner_text()
    page.keyboard.press("Escape")
    assert dialog.is_hidden()
    wait_until(page, f"{at} === '2'")  # the close event of a dialog comes a moment later
    unnamed = """() => [
        ...document.querySelectorAll("canvas, select, input, button, article, dialog, [role=img]")].filter(
        (node) => !(node.getAttribute("aria-label") || node.getAttribute("aria-labelledby") || node.labels?.length
        || node.textContent.trim())).map((node) => node.outerHTML)"""
    assert page.evaluate(unnamed) == []
    assert page.locator("table").count() == page.locator("table caption").count() > 2


def test_a_plot_hides_no_button_and_points_to_its_table(page_file, open_page):
    page = open_page(page_file)
    plot = page.locator("#figure-gmacs .plot")
    plot.locator("svg").first.wait_for()
    focusable = "node => [...node.querySelectorAll('*')].filter((one) => one.tabIndex >= 0).length"
    assert plot.evaluate(focusable) > 0
    assert page.locator("[role=img] *").count() == 0
    assert plot.get_attribute("role") == "group" and "Accuracy and multiply-adds" in plot.get_attribute("aria-label")
    captions = {}
    for plot in page.locator(".plot").all():
        name = plot.evaluate("node => node.closest('figure').id")
        captions[name] = page.locator("#" + plot.get_attribute("aria-details")).locator("caption").inner_text()
    assert captions["figure-gmacs"].startswith("Evaluation")
    assert captions["figure-train-lr"].startswith("Training")


def test_tables_are_sorted_by_their_headers(data, open_page, tmp_path):
    about = describe(gather([data]))
    rows = [
        ["b", "alpha 0.1", "9.5 % (3.0 to 99.0)", "1,200", "1e-05", ""],
        ["run-10", "alpha 0.05", "80.0 % (70.1 to 88.2)", "900", "0.001", "yes"],
        ["run-2", "budget 9", "9.5 % (2.0 to 12.0)", "", "-3", "no"],
        ["a", "budget 12", "100.0 %", "1,000,000", "2", ""],
    ]
    columns = ["run", "setting", "top-1", "images/s", "lr", "finished"]
    made = {"id": "made", "caption": "Made", "note": "", "columns": columns, "rows": rows}
    about["tables"]["accuracy"] = [made, made | {"id": "other", "caption": "Other"}]
    (tmp_path / "index.html").write_text(render(about, None))
    page = open_page(tmp_path / "index.html")
    first, other = page.locator("#accuracy table").all()
    runs = first.locator("tbody th")
    assert runs.all_inner_texts() == ["b", "run-10", "run-2", "a"] and first.locator("[aria-sort]").count() == 0
    for column, key, direction, expected in (
        ("run", "Enter", "ascending", ["a", "b", "run-2", "run-10"]),
        ("run", "Space", "descending", ["run-10", "run-2", "b", "a"]),
        ("top-1", "Enter", "ascending", ["run-2", "b", "run-10", "a"]),  # equal rows keep their order
        ("top-1", "Enter", "descending", ["a", "run-10", "run-2", "b"]),
        ("images/s", "Enter", "ascending", ["run-10", "b", "a", "run-2"]),
        ("images/s", "Enter", "descending", ["a", "b", "run-10", "run-2"]),  # empty cells come last
        ("lr", "Space", "ascending", ["run-2", "b", "run-10", "a"]),
        ("setting", "Enter", "ascending", ["run-10", "b", "run-2", "a"]),
        ("finished", "Enter", "ascending", ["run-2", "run-10", "b", "a"]),
    ):
        head = first.locator("thead th").nth(columns.index(column))
        head.get_by_role("button", name=column, exact=True).focus()
        page.keyboard.press(key)
        assert runs.all_inner_texts() == expected, (column, direction)
        assert head.get_attribute("aria-sort") == direction and first.locator("[aria-sort]").count() == 1
        assert page.evaluate("document.activeElement.textContent") == column
    values = [row.locator("td").all_inner_texts() for row in first.locator("tbody tr").all()]
    assert values == [{row[0]: row[1:] for row in rows}[run] for run in expected]
    assert other.locator("tbody th").all_inner_texts() == ["b", "run-10", "run-2", "a"]
    assert other.locator("[aria-sort]").count() == 0


def test_focus_stays_at_the_ends_of_the_enlarged_view(page_file, open_page):
    page = open_page(page_file)
    page.locator(".entry[data-at='0']").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    focused, shown = "document.activeElement.id", page.locator("#enlarged .key")
    ends = (("before", "ArrowRight", "1 of 20", "2 of 20"), ("after", "ArrowLeft", "20 of 20", "19 of 20"))
    for button, back, last, beside in ends:
        page.locator(f"#{button}").focus()
        while last not in (before := shown.inner_text()):
            page.keyboard.press("Enter")
            assert shown.inner_text() != before
        assert page.evaluate(focused) == button
        assert page.locator(f"#{button}").get_attribute("aria-disabled") == "true"
        page.keyboard.press("Enter")  # a disabled button does nothing
        assert last in shown.inner_text() and page.evaluate(focused) == button
        page.keyboard.press(back)
        assert beside in shown.inner_text() and page.locator("#enlarged [aria-disabled='true']").count() == 0


def test_focus_stays_when_the_window_changes(page_file, open_page):
    page = open_page(page_file)
    height = "document.querySelector('.entries').offsetHeight"
    page.locator(".entry[data-at='0']").focus()
    page.keyboard.press("ArrowDown")
    for width in (900, 1300):
        before = page.evaluate(height)
        page.set_viewport_size({"width": width, "height": 900})
        wait_until(page, f"{height} !== {before}")
        assert page.evaluate("document.activeElement.dataset.at") == "1"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.at") == "2"
    # Focus outside of the list stays.
    page.locator("#reset").focus()
    before = page.evaluate(height)
    page.set_viewport_size({"width": 900, "height": 900})
    wait_until(page, f"{height} !== {before}")
    assert page.evaluate("document.activeElement.id") == "reset"


def test_hostile_names_stay_names(data, page_file, open_page):
    page = open_page(page_file)
    assert page.title() == "zpipe report" and page.locator("img[src='x']").count() == 0
    assert HOSTILE in page.locator("#filter-class option").all_text_contents()
    assert page.locator("a[href^='http']").count() == 0


def test_names_in_plots_are_text(data, open_page, tmp_path):
    about = describe(gather([data]))
    for figure in about["figures"]["accuracy"]:
        assert figure["data"]
    rows = [result(run=HOSTILE, value=0.5), result(run=HOSTILE, metric="gmacs", value=1.0)]
    about["figures"]["accuracy"] = curves(points(rows), {})
    (tmp_path / "index.html").write_text(render(about, None))
    page = open_page(tmp_path / "index.html")
    page.wait_for_selector(".legendtext")
    assert page.locator(".legendtext").first.text_content().startswith("</script><img")
    assert page.locator("svg a").count() == 0 and page.title() == "zpipe report"


def test_text_stands_out_from_its_ground_and_a_narrow_screen_is_enough(page_file, open_page):
    """WCAG AA: a contrast of 4.5 to 1 for every pair of text and background."""
    page = open_page(page_file)
    read = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"

    def luminance(name):
        colour = page.evaluate(read, name)
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for ink in ("--text", "--quiet", "--link", "--good", "--bad"):
            for ground in ("--back", "--card"):
                high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, ink, ground)
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_thousand_entries(page_file, open_page, tmp_path):
    html = page_file.read_text()
    gallery = embedded(html, "gallery-data")
    some = gallery["entries"]
    gallery["entries"] = [some[n % len(some)] | {"key": f"copy {n}"} for n in range(2000)]
    (tmp_path / "index.html").write_text(render(embedded(html, "about-data"), gallery))
    page = open_page(tmp_path / "index.html")
    assert status(page) == 2000
    few = "document.querySelectorAll('.entry').length"
    assert 1 <= page.evaluate(few) < 20
    page.evaluate("document.getElementById('gallery-body').scrollIntoView()")
    # The median time of a frame while the page scrolls.
    middle = page.evaluate("""() => new Promise((resolve) => {
        const times = []; let last = performance.now(); let step = 0;
        const tick = (now) => { times.push(now - last); last = now; scrollBy(0, 400);
            if (++step < 60) requestAnimationFrame(tick);
            else resolve(times.sort((a, b) => a - b)[Math.floor(times.length / 2)]); };
        requestAnimationFrame(tick); })""")
    assert middle < 100
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_selector(".entry[data-at='1999']")
    page.wait_for_timeout(100)
    assert page.evaluate(few) < 20 and page.evaluate("document.querySelectorAll('#gallery *').length") < 1000
    assert page.locator(".entry[data-at='1999'] .key").inner_text() == "copy 1999"
    page.locator(".entry[data-at='1999']").focus()
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.at") == "0"
