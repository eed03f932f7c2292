"""Both pages: content, missing parts, and escaping of text from data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from manifests import edit_manifest
from synthetic_run import STEPS

from pocl_ds.config import ReportConfig
from pocl_ds.curriculum.plan import Plan
from pocl_ds.curriculum.sampler import Sampler
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.report import build, document
from pocl_ds.report.formatting import escape_markdown
from pocl_ds.report.sample_visits import count_sample_visits
from pocl_ds.runtime.formatting import format_duration
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import Manifest, read_manifest

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Collects tags and text, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            {"script": self.scripts, "style": self.styles}[tag].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.texts.append(data)
        else:
            self.styles[-1] += data

    @property
    def data(self) -> Any:
        """What the page's scripts read."""
        (start,) = (
            i for i, (tag, attributes) in enumerate(self.tags) if attributes.get("id") == "data"
        )
        number = sum(tag == "script" for tag, _ in self.tags[:start])
        return json.loads(self.scripts[number])

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def make_report(
    synthetic: Any, examples: int = 3, fingerprint: str = "f"
) -> tuple[Manifest, str, str]:
    manifest = build.build_report(
        synthetic.run,
        ReportConfig(num_examples=examples),
        recipe_yaml=synthetic.recipe,
        fingerprint=fingerprint,
    )
    return manifest, *(
        (synthetic.run.report / name).read_text(encoding="utf-8")
        for name in ("report.html", "report.md")
    )


def test_both_pages_show_the_results(synthetic: Any) -> None:
    synthetic.everything()
    manifest, html, markdown = make_report(synthetic)
    page = Page(html)
    assert (
        "The student reaches 80% of the teacher's ROUGE-L on test (14.2 of 17.8; 2.1 before)."
        in page.text
    )
    assert "held-out loss is 4.25 nats per token (5.41 before, 3.98 for the teacher)" in page.text
    titles = [
        "ROUGE-L against cross-entropy",
        "Difficulty: cross-entropy",
        "Difficulty: ROUGE-L",
        "Training loss",
        "Temperature and SFT ratio",
        "Validation",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "MFU",
        "Load imbalance",
        "Time of a step",
        "Sample visits",
    ]
    assert (
        all(title in page.text for title in titles)
        and [chart["title"] for chart in page.data["charts"]] == titles
    )
    loss = page.data["charts"][3]
    assert [curve["name"] for curve in loss["series"]] == ["total", "KD loss", "SFT loss"] and loss[
        "bands"
    ][-1][2] == "stage 4"
    assert page.data["charts"][0]["names"] == [
        "subset 1 (easiest)",
        "subset 2",
        "subset 3",
        "subset 4 (hardest)",
    ]
    sentence = (
        "180 optimizer steps on 2 ranks. Micro-batches were packed without padding, which would be "
        "31% of their tokens. A rank processed 205 tokens per second at 41% MFU; of a step: "
        "data 2%, teacher 30%, student 50%, optimizer 10%, wait 8%. The load imbalance of the "
        "ranks was 1.08."
    )
    assert sentence in page.text and sentence in markdown
    assert (
        manifest.info["examples"] == 3
        and manifest.info["samples"] == 400
        and manifest.info["bytes"] == len(html.encode())
    )
    assert len(page.data["items"][0]["ids"]) == 30 and len(page.data["samples"]["ids"]) == 400
    assert "3 min 31 s" in page.text and "1 min 04 s" in page.text  # as the steps recorded
    assert "name: synthetic" in page.text and "torch" in page.text
    assert "| student after | 4.250 | 0.800 | 14.20 ± 0.42 |" in markdown
    assert manifest.info["missing"] == [] and "missing" not in {
        a.get("class") for _, a in page.tags
    }


def test_the_table_of_a_benchmark_has_every_measure(synthetic: Any) -> None:
    synthetic.everything()
    _, html, markdown = make_report(synthetic)
    assert "95% interval" in Page(html).text and "judge" not in Page(html).text + markdown
    path = synthetic.run.evaluation / "results.json"
    results = json.loads(path.read_text())
    verdict = {
        "mode": "score",
        "model": "j",
        "items": 30,
        "without_score": 1,
        "mean": 6.543,
        "deviation": None,
    }
    results["models"]["student"]["benchmarks"]["test"]["judge"] = verdict
    write_json(path, results)
    shutil.rmtree(synthetic.run.report)
    _, html, markdown = make_report(synthetic)
    header, *rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in markdown.splitlines()
        if line.startswith(("| benchmark", "| test"))
    ]
    by_model = {row[1]: dict(zip(header, row, strict=True)) for row in rows}
    assert by_model["student after"]["judge"] == "6.54" and by_model["teacher"]["judge"] == "–"
    low, high = map(float, by_model["student after"]["95% interval"].split(" to "))
    assert low < 14.2 < high and high - low < 4
    for model in ("student before", "student after", "teacher"):
        cells = by_model[model]
        assert (cells["distinct-1"], cells["loss/token"], cells["KL to teacher"]) == (
            "0.25",
            "4.321",
            "0.765",
        )
    assert all(name in Page(html).text for name in (*header, *by_model["student after"].values()))


def test_footnotes_are_on_both_pages(synthetic: Any) -> None:
    synthetic.everything()
    path = synthetic.run.evaluation / "results.json"
    write_json(
        path, {**json.loads(path.read_text()), "footnotes": {"test": ["2 of 30 prompts cut"]}}
    )
    _, html, markdown = make_report(synthetic)
    assert (
        Page(html).text.count("ROUGE-L, test ⚠") == 2
        and "⚠ test: 2 of 30 prompts cut" in Page(html).text
    )
    assert "ROUGE-L, test ⚠" in markdown and "\n⚠ test: 2 of 30 prompts cut\n" in markdown


def test_a_teacher_that_training_uses_differently_is_a_footnote(synthetic: Any) -> None:
    synthetic.everything()
    synthetic.recipe += "teacher: {model: T, quantization: bnb_4bit, ensemble: [{model: U}]}\n"
    _, html, markdown = make_report(synthetic)
    for sentence in (
        "KL to teacher is computed with T alone, while training uses a mixture of 2 teachers.",
        "KL to teacher is computed without quantization, while training quantizes",
    ):
        assert sentence in Page(html).text and sentence in markdown


def test_the_provenance_of_results_is_shown(synthetic: Any) -> None:
    synthetic.everything()
    edit_manifest(synthetic.run.train / "manifest.json", info={"resumed_at": 1234})
    manifest = read_manifest(synthetic.run.train)
    text = Page(make_report(synthetic)[1]).text
    assert "Fingerprints of the steps" in text and all(16 * letter in text for letter in "drpte")
    assert "started after optimizer step 1,234" in text
    assert all(version in text for version in manifest.versions.values())  # type: ignore[union-attr]
    assert "process hours" in text and "name: synthetic" in text


def test_the_page_fetches_nothing_and_runs_only_its_own_scripts(synthetic: Any) -> None:
    synthetic.everything()
    page = Page(make_report(synthetic)[1])
    assert not {"link", "img", "iframe", "object", "form", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "data", "style"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith("#")  # sections of the page
        assert not any(name.startswith("on") for name in attributes), tag
    assert "url(" not in "".join(page.styles) and "@import" not in "".join(page.styles)
    policy = next(
        a["content"]
        for t, a in page.tags
        if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert (
        policy
        and policy.startswith("default-src 'none'; script-src 'sha256-")
        and "unsafe" not in policy
    )
    data = json.dumps(page.data)
    runs = [text for text in page.scripts if not text.startswith('{"charts"')]
    for text in (*runs, *page.styles):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert len(runs) == 5 and data


def test_the_license_names_the_version_of_the_library() -> None:
    notice = (document.ASSETS / "uplot.LICENSE.txt").read_text()
    version = re.search(r"uplot (\d+\.\d+\.\d+)", notice)
    assert version and f"(v{version[1]})" in (document.ASSETS / "uplot.js").read_text()[:200]
    assert "MIT License" in notice and "Leon Sorokin" in notice


@pytest.mark.parametrize(
    "name", [path.name for path in sorted(document.ASSETS.iterdir()) if path.name != "uplot.js"]
)
def test_assets_are_short_enough_to_read(name: str) -> None:
    text = (document.ASSETS / name).read_text()
    assert len(text.splitlines()) < 400 and "</script" not in text and "</style" not in text


def test_text_from_data_is_escaped(synthetic: Any, attack: str) -> None:
    synthetic.everything()
    shutil.rmtree(synthetic.run.evaluation)
    synthetic.evaluation(
        {"initial": attack, "student": attack + "</pre></div>", "teacher": "\ud800 half a pair"}
    )
    synthetic.recipe = synthetic.recipe.replace("synthetic", "'</title><script>1</script>'")
    _, html, markdown = make_report(synthetic)
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.tags) == 6  # the page's own and the data
    assert page.data["items"][0]["answers"][0][0].startswith(
        "<script>alert('x')</script> | one\ntwo"
    )  # unchanged
    assert "\u0007" not in html and page.data["items"][0]["answers"][2][0] == "\ufffd half a pair"
    assert "</title><script>1</script>" in page.text and "<!--" not in html
    rows = [line for line in markdown.splitlines() if line.startswith("| Explain")]
    assert len(rows) == 3  # a line break in an answer does not end its row
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 6
    prose = markdown.partition("```yaml")[0]  # text in the recipe's code block is literal
    assert "<script" not in prose and "![i]" not in prose and "http://" not in prose


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),
        ("a\r\nb\nc", "a<br>b<br>c"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("`x`*y*", r"\`x\`\*y\*"),
    ],
)
def test_markdown_cells_are_literal(text: str, cell: str) -> None:
    assert escape_markdown(text) == cell


@pytest.mark.parametrize(
    ("folder", "sentence", "title"),
    [
        ("evaluation", "There is no finished evaluation", "Results"),
        ("ranking", "The samples are not ranked yet", "Difficulty"),
        ("train", "Training has not started", "Training loss"),
        ("plan", "There is no plan yet", "Curriculum"),
    ],
)
def test_a_missing_part_is_left_out_and_named(
    synthetic: Any, folder: str, sentence: str, title: str
) -> None:
    synthetic.everything()
    shutil.rmtree(getattr(synthetic.run, folder))
    _, html, markdown = make_report(synthetic)
    page = Page(html)
    assert sentence in page.text and sentence in markdown
    assert not any(text == title for text in page.texts)


def test_unfinished_steps_give_no_results(
    synthetic: Any,
) -> None:
    synthetic.data()
    synthetic.plan()
    synthetic.train(finished=False)
    synthetic.evaluation()
    (synthetic.run.evaluation / "manifest.json").unlink()
    page = Page(make_report(synthetic)[1])
    assert "Training is not finished" in page.text and "Training loss" in page.text
    assert "No result yet" in page.text and "17.8" not in page.text


def test_an_empty_run_has_a_page(synthetic: Any) -> None:
    manifest, html, _ = make_report(synthetic)
    assert len(manifest.info["missing"]) == 4
    assert "No result yet" in Page(html).text


def test_the_page_of_a_long_run_is_small(synthetic: Any) -> None:
    synthetic.plan(50_000)
    synthetic.train(100_000)
    synthetic.ranking(50_000)
    _, html, _ = make_report(synthetic)
    assert len(html) < 3_000_000
    page = Page(html)
    assert all(
        len(curve["xs"]) <= 4000
        for chart in page.data["charts"]
        for curve in chart.get("series", [])
    )
    assert "30,000 of 50,000 samples are shown" in page.text


def test_ten_thousand_samples_stay_under_ten_megabytes(synthetic: Any) -> None:
    synthetic.data(12_000, ["Ein langer Text mit Umlauten äöü <b> und so weiter. " * 40])
    synthetic.plan(12_000)
    synthetic.train()
    synthetic.ranking(12_000)
    synthetic.evaluation(items=3000, extra="x" * 2000)
    manifest, html, _ = make_report(synthetic)
    page = Page(html)
    num_samples = len(page.data["samples"]["ids"])
    assert len(html.encode()) < 10_000_000
    assert 1000 < num_samples < 10_000 and manifest.info["samples"] == num_samples
    assert f"{num_samples:,} of 12,000 samples, evenly spaced along the ranking" in page.text
    assert f"Items: {len(page.data['items'][0]['ids']):,} of 3,000 of test" in page.text
    assert (
        page.data["samples"]["positions"][0] == 0
        and page.data["samples"]["positions"][-1] == 11_999
    )


def test_samples_show_their_visits(synthetic: Any) -> None:
    synthetic.everything()
    data = Page(make_report(synthetic)[1]).data
    assert sum(data["samples"]["visits"]) == 8 * STEPS  # batches of 8
    assert data["samples"]["prompts"][7] == "Say what sample 7 is about. "
    assert data["samples"]["responses"][7] == "the 7 "


def test_stages_that_the_student_ranked_are_shown(synthetic: Any) -> None:
    synthetic.everything()
    _, html, markdown = make_report(synthetic)
    assert "stage rankings" not in html and "ranked by" not in markdown
    weights = np.linspace(0.5, 2, 400, dtype=np.float32)
    weights[:40] = 0
    synthetic.stage_ranking(1, np.arange(400)[::-1])
    synthetic.stage_ranking(2, np.arange(400), weights)
    # Of another training, whose directory was used again.
    synthetic.stage_ranking(0, np.arange(400)[::-1], fingerprint="o" * 64)

    _, html, markdown = make_report(synthetic)
    low = f"{weights[40]:.3g}"
    rows = [
        ["2", "loss_ratio", "1,234", "1 min 15 s", "0.812", "0", "1"],
        ["3", "loss_ratio", "1,234", "1 min 15 s", "0.812", "40", f"{low} to 2"],
    ]
    table = html[html.index("stage rankings") :]
    table = table[: table.index("</table>")]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["2", "3"]
    for stage, *cells in rows:
        html_cells = "".join(f"<td>{cell}</td>" for cell in cells)
        assert f'<th scope="row">{stage}</th>{html_cells}' in table
        assert "| " + " | ".join([stage, *cells]).replace("_", "\\_") + " |" in markdown
    # Stages 1 and 4 have the easiest samples, stages 2 and 4 the hardest ones, at least once.
    visits = Page(html).data["samples"]["visits"]
    assert sum(visits) == 8 * STEPS and min(visits[:40]) >= 2 and min(visits[310:]) >= 2


def test_a_plan_of_another_ranking_is_not_shown(synthetic: Any) -> None:
    synthetic.data(300)
    synthetic.plan(400)
    synthetic.train()
    synthetic.ranking(300)
    assert (
        "The plan was made for 400 samples and the ranking has 300"
        in Page(make_report(synthetic)[1]).text
    )


def test_jobs_attempts_and_memory_are_shown(synthetic: Any) -> None:
    synthetic.everything()
    folder = synthetic.run.cluster / "attempts"
    folder.mkdir(parents=True)
    attempts = [
        {
            "number": 1,
            "job": "71",
            "nodes": ["n1", "n2"],
            "start": 0.0,
            "end": 1800.0,
            "outcome": "retry",
            "reason": "<b>",
        },
        {"number": 2, "job": "71", "nodes": ["n1", "n3"], "start": 2000.0},
    ]
    (folder / "train.jsonl").write_text(
        "\n".join(map(json.dumps, attempts)) + '\n{"number": 3, "jo'
    )
    write_json(
        synthetic.run.cluster / "submission.json",
        {"profile": "gpu", "code": "abc", "jobs": ["train"]},
    )
    page = Page(make_report(synthetic)[1])
    assert (
        "1.00 node hours, 1 restarts" in page.text
        and "Jobs and attempts (2, 1 restarts)" in page.text
    )
    assert "end unknown" in page.text and "<b>" in page.text and "30 min 00 s" in page.text
    assert re.search(r"\d+(\.\d+)? [MG]iB", page.text)  # of this process, which wrote the manifests
    later = make_report(synthetic)[0]
    with (folder / "train.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps(attempts[1] | {"end": 2600.0}) + "\n")
    assert make_report(synthetic)[0].info["inputs"] != later.info["inputs"]


def test_the_report_is_reused_until_the_run_changes(synthetic: Any) -> None:
    synthetic.data()
    manifest, _, _ = make_report(synthetic)
    path = synthetic.run.report / "report.html"
    before = path.stat().st_mtime_ns
    assert make_report(synthetic)[0] == manifest and path.stat().st_mtime_ns == before
    synthetic.evaluation()
    assert "17.80" in make_report(synthetic)[1]
    changed = path.stat().st_mtime_ns
    assert (
        make_report(synthetic, fingerprint="g")[0].fingerprint == "g"
        and path.stat().st_mtime_ns != changed
    )
    path.write_text("cut")
    assert "17.80" in make_report(synthetic, fingerprint="g")[1]
    manifest = read_manifest(synthetic.run.evaluation)
    assert manifest is not None
    next(iter(manifest.files.values()))["sha256"] = "of another training with the same recipe"
    edit_manifest(synthetic.run.evaluation / "manifest.json", files=manifest.files)
    changed = path.stat().st_mtime_ns
    make_report(synthetic, fingerprint="g")
    assert path.stat().st_mtime_ns != changed


def test_an_error_leaves_the_old_page(synthetic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.data()
    _, old, _ = make_report(synthetic)
    synthetic.evaluation()

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError

    monkeypatch.setattr(build, "markdown_page", fail)
    with pytest.raises(RuntimeError):
        make_report(synthetic)
    assert (synthetic.run.report / "report.html").read_text(encoding="utf-8") == old
    assert sorted(p.name for p in synthetic.run.report.iterdir()) == [
        "manifest.json",
        "report.html",
        "report.md",
    ]
    assert read_manifest(synthetic.run.report) is not None


def test_examples_do_not_depend_on_the_order_of_a_file(synthetic: Any) -> None:
    synthetic.evaluation()
    numbers = re.findall(r"does \((\d+)\)", make_report(synthetic)[2])
    for path in synthetic.run.evaluation.rglob("*.jsonl"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join(reversed(lines)) + "\n")
    shutil.rmtree(synthetic.run.report)
    assert re.findall(r"does \((\d+)\)", make_report(synthetic)[2]) == numbers and len(numbers) == 3


def test_no_examples_and_one_seed(synthetic: Any) -> None:
    synthetic.evaluation()
    path = synthetic.run.evaluation / "results.json"
    results = json.loads(path.read_text())
    results["seeds"] = [10]
    for entry in results["models"].values():
        entry["benchmarks"]["test"]["rouge_l_deviation"] = None
    path.write_text(json.dumps(results))
    _, html, markdown = make_report(synthetic, examples=0)
    page = Page(html)
    assert "## Answers" not in markdown
    assert "one seed" in page.text and "±" not in page.text


def test_lost_answers_are_one_sentence(synthetic: Any) -> None:
    synthetic.evaluation()
    (synthetic.run.evaluation / "teacher" / "test-seed10.jsonl").unlink()
    with pytest.raises(
        ArtifactError,
        match=r"teacher/test-seed10\.jsonl is missing: run `pocl evaluate --model teacher`",
    ):
        make_report(synthetic)


def test_a_random_order_has_no_difficulty(synthetic: Any) -> None:
    synthetic.plan()
    synthetic.ranking()
    edit_manifest(synthetic.run.ranking / "manifest.json", info={"strategy": "random"})
    text = Page(make_report(synthetic)[1]).text
    assert "The order is random" in text and "hardest" not in text


def test_a_reversed_ranking_swaps_the_labels(synthetic: Any, tmp_path: Path) -> None:
    synthetic.plan()
    synthetic.ranking()
    edit_manifest(synthetic.run.ranking / "manifest.json", info={"reverse": True})
    assert Page(make_report(synthetic)[1]).data["charts"][0]["names"][0] == "subset 1 (hardest)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize("window", [1, 3])
def test_visits_equal_the_draws_of_the_sampler(
    window: int, synthetic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a window, batches depend on lengths, which matters in an incomplete epoch."""
    synthetic.everything()
    run, plan = synthetic.run, json.loads((synthetic.run.plan / "plan.json").read_text())
    random, size = np.random.default_rng(0), plan["stages"][-1]["stop"]
    order, tokens = random.permutation(size), random.integers(1, 99, size)
    np.save(run.ranking / "order.npy", order)
    monkeypatch.setattr(TokenizedSplit, "open", lambda *_: SimpleNamespace(total_tokens=tokens))
    visits = count_sample_visits(run, plan, seed=3, window=window, steps=7)
    sampler = Sampler(Plan.from_json(plan, order), 3, lengths=tokens, window=window)
    drawn = np.concatenate([sampler.batch(step) for step in range(7)])
    assert visits.tolist() == np.bincount(drawn, minlength=size)[order].tolist()
