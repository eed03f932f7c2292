"""Templates that would take all time or memory are refused in one sentence."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pocl_ds.config import PromptConfig
from pocl_ds.data import template_limits
from pocl_ds.data.conversation import Sample
from pocl_ds.data.templates import load_template
from pocl_ds.data.tokenize_workers import map_chunks
from pocl_ds.errors import DataError, ModelError, RecipeError
from pocl_ds.models.load import load_tokenizer

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "wide": ("{{ '%0999999999d' % 1 }}", "GiB of memory"),
    "very wide": ("{{ '%09999999999d' % 1 }}{{ 'x' * 9999999999 }}", "GiB of memory"),
    "loops": (LOOPS, "1 s"),
    "a loop that collects": (
        "{% set ns = namespace(t='xx') %}{% for a in range(99) %}"
        "{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "GiB of memory",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_a_template_file_is_one_sentence(
    bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 1)
    monkeypatch.setattr(template_limits, "MAX_BYTES", 1 << 29)
    text, limit = BOMBS[bomb]
    file = tmp_path / "t.jinja"
    file.write_text(text)
    tokenizer = SimpleNamespace(bos_token="<s>", eos_token="</s>", chat_template=None)
    start = time.monotonic()
    with pytest.raises(RecipeError, match=r"t\.jinja takes more than .* for one short sample"):
        load_template(tokenizer, PromptConfig(template=str(file)))
    assert time.monotonic() - start < 30, limit


def test_a_bomb_in_a_chat_template_is_one_sentence(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 1)
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.chat_template = LOOPS
    with pytest.raises(ModelError, match="chat template takes more than 1 s for one short sample"):
        load_template(tokenizer, PromptConfig(template="chat"))


def test_work_within_the_limits_is_none() -> None:
    assert template_limits.exceeded_limit(lambda: 1 / 0) is None
    assert template_limits.exceeded_limit(lambda: time.sleep(0.1)) is None


def test_a_process_that_the_kernel_kills_did_not_take_too_long() -> None:
    """The out-of-memory killer sends SIGKILL."""
    kill = template_limits.exceeded_limit(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert kill == "the memory that is free"


# Templates that cost too much with the sample of `COSTLY` only.
COSTLY = "please repeat"
LATE_BOMBS = {
    "loops": f"{{% if '{COSTLY}' in TEXT %}}{LOOPS}{{% endif %}}{{{{ TEXT }}}}",
    "wide": f"{{% if '{COSTLY}' in TEXT %}}{{{{ '%0999999999d' % 1 }}}}{{% endif %}}{{{{ TEXT }}}}",
}


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("bomb", LATE_BOMBS)
@pytest.mark.parametrize("template", ["file", "chat"])
def test_a_template_that_some_records_make_costly_names_the_record(
    template: str,
    bomb: str,
    num_workers: int,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 1)
    monkeypatch.setattr(template_limits, "MAX_BYTES", 1 << 29)
    before = resource.getrlimit(resource.RLIMIT_AS)
    tokenizer = load_tokenizer(str(tiny_llama))
    name = "chat"
    if template == "file":
        name = str(tmp_path / "t.jinja")
        Path(name).write_text(LATE_BOMBS[bomb].replace("TEXT", "instruction"))
    else:
        body = LATE_BOMBS[bomb].replace("TEXT", "message['content']")
        tokenizer.chat_template = f"{{% for message in messages %}}{body}{{% endfor %}}"
    loaded = load_template(tokenizer, PromptConfig(template=name))

    def lengths(texts: list[str]) -> list[int]:
        samples = [Sample.from_instruction(text, text, "a") for text in texts]
        return [len(loaded.render_prompt(sample)) for sample in samples]

    chunks = [[f"say {number}"] for number in range(6)] + [[COSTLY]]
    start, done = time.monotonic(), 0
    with pytest.raises(DataError) as exc_info:
        for _ in map_chunks(lengths, chunks, num_workers):
            done += 1
    assert done == 6 and time.monotonic() - start < 30
    limit = "1 s" if bomb == "loops" else "0.5 GiB of memory"
    assert COSTLY in str(exc_info.value).partition(": ")[0]
    assert f"costs too much with it (it takes more than {limit})" in str(exc_info.value)
    assert "\n" not in str(exc_info.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
