"""The report in headless Chromium: it opens without an error or a request, draws, searches,
filters, and prints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import SyntheticRun

from pocl_ds.config import ReportConfig
from pocl_ds.config.recipe_file import dump_recipe, load_recipe
from pocl_ds.errors import ArtifactError
from pocl_ds.report.build import build_report
from pocl_ds.report.compare import compare_runs

SAMPLES = 3000
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\"quotes\" 'and' `more` & &amp;",
    "שלום \u202e gnp.exe",
    "🧑‍🚀 𝒳",
    "\x00\x07 \ud800 control",
    "<!-- <script> --> {{constructor}}",
    "an ordinary sample",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Share of pixels of each chart that are not its background, measured on the canvas itself.
DRAWN = """() => [...document.querySelectorAll('.plot canvas')].map((canvas) => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let colors = new Set(), painted = 0;
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 100) {
    painted++;
    colors.add((data[i] >> 4) * 256 + (data[i + 1] >> 4) * 16 + (data[i + 2] >> 4));
  }
  return [painted / (data.length / 4), colors.size];
})"""


def chromium() -> str | None:
    """Path of Chromium, which is installed from Debian if possible."""
    path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if path or os.geteuid() != 0 or not shutil.which("apt-get"):
        return path
    script = "apt-get install -y chromium || { apt-get update && apt-get install -y chromium; }"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["sh", "-c", script], capture_output=True, timeout=300, env=environment)
    return shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed (launch/setup.sh --dev brings it)",
    )
    path = chromium()
    if path is None:
        pytest.skip("there is no Chromium, and it could not be installed: apt-get install chromium")
    with api.sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield instance
        instance.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    synthetic = SyntheticRun(tmp_path_factory.mktemp("report") / "run")
    synthetic.data(SAMPLES, HOSTILE)
    synthetic.plan(SAMPLES)
    synthetic.train()
    synthetic.ranking(SAMPLES)
    synthetic.evaluation(items=200, benchmarks=("test", "other"), extra=HOSTILE[0])
    build_report(synthetic.run, ReportConfig(), recipe_yaml=synthetic.recipe, fingerprint="f")
    return synthetic.run.report / "report.html"


class OpenPage:
    """An open page, with its errors and requests."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, **context}
        )
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def count(self, list_name: str) -> int:
        """Number of matches of a list."""
        text = self.page.locator(f'[data-list="{list_name}"] .count').inner_text()
        return int(text.split()[0].replace(",", ""))

    def wait_for_count(self, list_name: str, expected: int) -> None:
        """Wait for a search, which begins shortly after the last key."""
        words = re.compile(rf"^{expected:,} of ")
        self.page.locator(f'[data-list="{list_name}"] .count').filter(has_text=words).wait_for(
            timeout=4000
        )


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[OpenPage]:
    page = OpenPage(browser, report)
    yield page
    assert page.errors == []
    assert page.requests == [report.as_uri()]
    page.context.close()


def test_every_chart_is_drawn(opened: OpenPage) -> None:
    charts = opened.page.evaluate(DRAWN)
    assert len(charts) == 13
    for painted, colors in charts:
        assert painted > 0.01 and colors > 3


def test_samples_are_searched_filtered_and_opened(opened: OpenPage) -> None:
    page, root = opened.page, opened.page.locator('[data-list="samples"]')
    assert opened.count("samples") == SAMPLES
    assert root.locator(".rows > details").count() == 12  # one page
    root.locator("input").fill("<SCRIPT>alert(1)")
    opened.wait_for_count("samples", SAMPLES // len(HOSTILE))
    root.locator("summary").first.click()
    text = root.locator("details[open] pre").first.inner_text()
    assert text.startswith("Say what sample 0 is about. <script>alert(1)</script>")
    assert root.locator("mark").first.inner_text() == "<script>alert(1)"
    root.locator("input").fill("nothing of the kind")
    opened.wait_for_count("samples", 0)
    root.locator("input").fill("")
    opened.wait_for_count("samples", SAMPLES)
    root.locator("select").first.select_option("2")
    opened.wait_for_count("samples", SAMPLES // 4)
    assert set(root.locator(".values span:nth-child(2)").all_inner_texts()) == {"subset 3"}
    root.locator("select").nth(1).select_option("visits")
    visits = [
        int(text.split()[1]) for text in root.locator(".values span:nth-child(6)").all_inner_texts()
    ]
    assert visits == sorted(visits, reverse=True)
    root.locator(".pager button", has_text="next").click()
    assert "page 2 of" in root.locator(".pager").inner_text()
    assert page.evaluate("document.activeElement.textContent") == "next"  # the focus stays


def test_items_are_filtered_by_the_better_model(opened: OpenPage) -> None:
    root = opened.page.locator('[data-list="items"]')
    data = json.loads(opened.page.locator("#data").text_content())["items"][1]
    menus = {menu.get_attribute("data-field"): menu for menu in root.locator("select").all()}
    menus["benchmark"].select_option(label="other")
    assert menus["relation"].is_disabled()
    menus["left"].select_option(label="student after")
    menus["relation"].select_option("better")
    menus["right"].select_option(label="teacher")
    student, teacher = (
        data["scores"][data["models"].index(name)] for name in ("student after", "teacher")
    )
    better = sum(a > b for a, b in zip(student, teacher, strict=True))
    assert 0 < better < 200 and opened.count("items") == better
    root.locator("summary").first.click()
    root.locator("details[open] .answer").nth(3).wait_for()  # a row is filled when it opens
    assert root.locator("details[open] .answer").count() == 4
    rows = opened.page.locator("#details tbody tr")
    assert rows.count() == 6
    opened.page.locator("#benchmarks").select_option("other")
    assert [row.is_visible() for row in rows.all()] == [False] * 3 + [True] * 3


def test_charts_react_to_mouse_and_keyboard(opened: OpenPage) -> None:
    page = opened.page
    loss = page.locator("figure", has_text="Training loss")
    plot = loss.locator(".plot")
    plot.scroll_into_view_if_needed()
    box = loss.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    assert "@" in loss.locator(".key b").first.inner_text()
    assert (
        "@" in page.locator("figure", has_text="Learning rate").locator(".key b").first.inner_text()
    )  # cursors are synchronized
    reset = loss.locator(".reset")
    assert not reset.is_visible()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 60, steps=4)
    page.mouse.up()
    assert reset.is_visible()
    reset.click()
    assert not reset.is_visible()
    plot.focus()
    page.keyboard.press("+")
    assert reset.is_visible()
    page.keyboard.press("Escape")
    assert not reset.is_visible()
    key = loss.locator(".key").first
    key.click()
    assert key.get_attribute("aria-pressed") == "false"


def test_a_click_on_a_dot_shows_its_sample(opened: OpenPage) -> None:
    page = opened.page
    scatter = page.locator("figure", has_text="ROUGE-L against").locator(".u-over")
    scatter.scroll_into_view_if_needed()
    box = scatter.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
    tip = page.locator(".tip").inner_text()
    page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
    assert (
        tip.split(",")[0]
        in page.locator('[data-list="samples"] details[open] summary').inner_text().split()
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_in_light_and_dark(
    browser: Any, report: Path, scheme: str, width: int
) -> None:
    opened = OpenPage(
        browser, report, viewport={"width": width, "height": 844}, color_scheme=scheme
    )
    page = opened.page
    for root in ("samples", "items"):
        page.locator(f'[data-list="{root}"] summary').first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = page.evaluate(
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, .sr') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.className)"
    )
    assert wide == []
    assert all(painted > 0.01 for painted, _ in page.evaluate(DRAWN))
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
    assert opened.errors == [] and len(opened.requests) == 1
    opened.context.close()


def test_the_printed_page_is_light(browser: Any, report: Path, tmp_path: Path) -> None:
    opened = OpenPage(browser, report, color_scheme="dark")
    pdf = opened.page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
    opened.page.emulate_media(media="print")
    opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert (
        opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert opened.page.evaluate("cssColor('ink')") == "#1b2130"
    assert max(opened.page.evaluate("CHARTS.map((chart) => chart.plot.width)")) <= 690
    opened.page.set_viewport_size(
        {"width": 690, "height": 1000}
    )  # A4 between its margins: what is wider would be cut
    widths = opened.page.evaluate(
        "[...document.querySelectorAll('.scroll')].map((box) => [box.scrollWidth, box.clientWidth])"
    )
    assert len(widths) > 2 and all(needed <= there for needed, there in widths)
    assert opened.errors == []
    opened.context.close()


def test_reports_of_an_unfinished_run_and_of_several_open(browser: Any, tmp_path: Path) -> None:
    runs = []
    for number, name in enumerate(("one", "two", "half")):
        synthetic = SyntheticRun(tmp_path / name)
        synthetic.plan()
        synthetic.train(finished=name != "half")
        if name != "half":
            synthetic.evaluation(extra=HOSTILE[number])
        synthetic.run.recipe.write_text(
            dump_recipe(load_recipe("quickstart", [f"train.lr=0.000{number + 1}"]))
        )
        runs.append(synthetic.run.path)
    build_report(synthetic.run, ReportConfig(), recipe_yaml=synthetic.recipe, fingerprint="f")
    with pytest.raises(ArtifactError, match="other prompts"):
        compare_runs(runs)
    half, forced = synthetic.run.report / "report.html", compare_runs(runs, force=True)
    (synthetic.run.path.parent / "two" / "evaluation" / "manifest.json").unlink()
    together = compare_runs(runs, tmp_path / "together.html")
    for file, sentence in (
        (half, "Training is not finished"),
        (forced, "not comparable"),
        (together, "two: There is no"),
    ):
        opened = OpenPage(browser, file)
        assert sentence in opened.page.locator(".missing").inner_text()
        assert all(painted > 0.01 for painted, _ in opened.page.evaluate(DRAWN))
        assert opened.errors == [] and len(opened.requests) == 1
        opened.context.close()
