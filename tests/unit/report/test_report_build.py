"""The pages: what they say, what they refuse to say, and that no text from data does harm."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pocl_ds.artifacts import Manifest, read_manifest
from pocl_ds.config import ReportConfig
from pocl_ds.errors import ArtifactError
from pocl_ds.report import build
from pocl_ds.report.words import clock, markdown_cell

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Collects tags and text, and holds every tag to its closing one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make(synthetic: Any, examples: int = 3, fingerprint: str = "f") -> tuple[Manifest, str, str]:
    manifest = build.build_report(
        synthetic.run, ReportConfig(examples=examples), recipe_yaml=synthetic.recipe, fingerprint=fingerprint
    )
    return manifest, *((synthetic.run.report / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))


def test_the_page_says_what_the_run_found(synthetic: Any) -> None:
    synthetic.everything()
    manifest, html, markdown = make(synthetic)
    page = Page(html)
    assert "The student reaches 80% of the teacher's ROUGE-L on test (14.2 of 17.8; 2.1 before)." in page.text
    assert "held-out loss is 4.25 nats per token (5.41 before, 3.98 for the teacher)" in page.text
    for title in ("Training loss", "Temperature and SFT ratio", "Learning rate", "Throughput", "Validation",
                  "Difficulty: cross-entropy", "Difficulty: ROUGE-L", "ROUGE-L against cross-entropy"):  # fmt: skip
        assert title in page.text
    assert {"total", "KD", "CE", "stage 4", "optimizer step", "loss (nats per token)", "tokens per second",
            "subset 1 (easiest)", "subset 4 (hardest)"} <= set(page.words)  # fmt: skip
    said = "steps on 2 ranks; micro-batches were packed without padding, which would be 31% of their tokens."
    assert said in page.text and said in markdown
    assert sum(tag == "article" for tag, _ in page.tags) == 3 and manifest.info["examples"] == 3
    assert "3 min 31 s" in page.text and "1 min 04 s" in page.text  # the stages' own seconds
    assert "name: synthetic" in page.text and "torch" in page.text
    assert "| student after | 4.250 | 0.800 | 14.20 ± 0.42 |" in markdown
    assert manifest.info["missing"] == [] and "missing" not in {a.get("class") for _, a in page.tags}


def test_nothing_is_fetched_and_nothing_runs(synthetic: Any) -> None:
    synthetic.everything()
    page = Page(make(synthetic)[1])
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "data"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes), tag
    style = " ".join(page.words)
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy
    assert "prefers-color-scheme:dark" in style


def test_text_from_data_is_only_text(synthetic: Any, attack: str) -> None:
    synthetic.everything()
    shutil.rmtree(synthetic.run.evaluation)
    synthetic.evaluation({"initial": attack, "student": attack + "</pre></div>", "teacher": "\ud800 half a pair"})
    synthetic.recipe = f"name: '{'</title><script>1</script>'}'\n"
    _, html, markdown = make(synthetic)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert('x')</script> | one" in page.text  # shown as it is
    assert "\u0007" not in html and "\ufffd half a pair" in page.text
    rows = [line for line in markdown.splitlines() if line.startswith("| Explain")]
    assert len(rows) == 3  # a line break in an answer does not end its row
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 6
    prose = markdown.partition("```yaml")[0]  # the recipe stands in a fence, where text is literal
    assert "<script" not in prose and "![i]" not in prose and "http://" not in prose


@pytest.mark.parametrize(
    ("text", "cell"),
    [("a|b", r"a\|b"), ("a\\|b", r"a\\\|b"), ("a\r\nb\nc", "a<br>b<br>c"), ("<b>&", "&lt;b&gt;&amp;"), ("`x`*y*", r"\`x\`\*y\*")],
)
def test_markdown_cells_are_literal(text: str, cell: str) -> None:
    assert markdown_cell(text) == cell


@pytest.mark.parametrize(
    ("stage", "sentence", "gone"),
    [("evaluation", "There is no finished evaluation", "Results"), ("ranking", "The samples are not ranked yet", "Difficulty"),
     ("train", "Training has not started", "Training loss"), ("plan", "There is no plan yet", "Curriculum")],
)  # fmt: skip
def test_a_missing_part_is_left_out_and_named(synthetic: Any, stage: str, sentence: str, gone: str) -> None:
    synthetic.everything()
    shutil.rmtree(getattr(synthetic.run, stage))
    _, html, markdown = make(synthetic)
    page = Page(html)
    assert sentence in page.text and sentence in markdown
    assert not any(word == gone for word in page.words)


def test_unfinished_training_and_unsealed_evaluation_are_not_taken_for_results(synthetic: Any) -> None:
    synthetic.data()
    synthetic.plan()
    synthetic.train(finished=False)
    synthetic.evaluation()
    (synthetic.run.evaluation / "manifest.json").unlink()
    page = Page(make(synthetic)[1])
    assert "Training is not finished" in page.text and "Training loss" in page.text
    assert "No result yet" in page.text and "17.8" not in page.text


def test_an_empty_run_makes_a_page(synthetic: Any) -> None:
    manifest, html, _ = make(synthetic)
    assert len(manifest.info["missing"]) == 4
    assert "No result yet" in Page(html).text


def test_a_long_run_makes_a_small_page(synthetic: Any) -> None:
    synthetic.plan(50_000)
    synthetic.train(100_000)
    synthetic.ranking(50_000)
    _, html, _ = make(synthetic)
    assert len(html) < 250_000
    root = Page(html)
    paths = [a["d"] or "" for t, a in root.tags if t == "path" and "line" in (a.get("class") or "") and len(a["d"] or "") > 40]
    assert paths and max(path.count("L") for path in paths) < 600
    dots = sum((a["d"] or "").count("h0") for t, a in root.tags if t == "path" and "soft" in (a.get("class") or ""))
    assert 1400 < dots <= 1500
    assert "1,500 of 50,000 samples are shown" in root.text


def test_repeating_finds_the_page_and_a_run_that_went_on_gets_a_new_one(synthetic: Any) -> None:
    synthetic.data()
    first, _, _ = make(synthetic)
    path = synthetic.run.report / "report.html"
    before = path.stat().st_mtime_ns
    assert make(synthetic)[0] == first and path.stat().st_mtime_ns == before
    synthetic.evaluation()
    assert "17.80" in make(synthetic)[1]
    changed = path.stat().st_mtime_ns
    assert make(synthetic, fingerprint="g")[0].fingerprint == "g" and path.stat().st_mtime_ns != changed
    path.write_text("cut")
    assert "17.80" in make(synthetic, fingerprint="g")[1]


def test_a_failure_leaves_the_old_page_whole(synthetic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.data()
    _, old, _ = make(synthetic)
    synthetic.evaluation()

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError

    monkeypatch.setattr(build, "markdown_page", fail)
    with pytest.raises(RuntimeError):
        make(synthetic)
    assert (synthetic.run.report / "report.html").read_text(encoding="utf-8") == old
    assert sorted(p.name for p in synthetic.run.report.iterdir()) == ["manifest.json", "report.html", "report.md"]
    assert read_manifest(synthetic.run.report) is not None


def test_examples_do_not_follow_the_order_of_a_file(synthetic: Any) -> None:
    synthetic.evaluation()
    shown = re.findall(r"does \((\d+)\)", make(synthetic)[1])
    for path in synthetic.run.evaluation.rglob("*.jsonl"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join(reversed(lines)) + "\n")
    shutil.rmtree(synthetic.run.report)
    assert re.findall(r"does \((\d+)\)", make(synthetic)[1]) == shown and len(shown) == 3


def test_no_examples_and_one_seed(synthetic: Any) -> None:
    synthetic.evaluation()
    path = synthetic.run.evaluation / "results.json"
    results = json.loads(path.read_text())
    results["seeds"] = [10]
    for entry in results["models"].values():
        entry["benchmarks"]["test"]["rouge_l_deviation"] = None
    path.write_text(json.dumps(results))
    page = Page(make(synthetic, examples=0)[1])
    assert "article" not in {tag for tag, _ in page.tags}
    assert "one seed" in page.text and "±" not in page.text


def test_lost_answers_are_one_sentence(synthetic: Any) -> None:
    synthetic.evaluation()
    (synthetic.run.evaluation / "teacher" / "test-seed10.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"teacher/test-seed10\.jsonl is missing: run `pocl evaluate --model teacher`"):
        make(synthetic)


def test_a_random_order_has_no_difficulty(synthetic: Any) -> None:
    synthetic.plan()
    synthetic.ranking()
    path = synthetic.run.ranking / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 400', '"samples": 400, "strategy": "random"'))
    text = Page(make(synthetic)[1]).text
    assert "The order is random" in text and "hardest" not in text


def test_a_reversed_ranking_says_so(synthetic: Any, tmp_path: Path) -> None:
    synthetic.plan()
    synthetic.ranking()
    path = synthetic.run.ranking / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 400', '"samples": 400, "reverse": true'))
    assert "subset 1 (hardest)" in Page(make(synthetic)[1]).text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (7500, "2 h 05 min")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
