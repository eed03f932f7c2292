"""Digests of a tokenizer: each change is named, and saving and loading is no change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_families
import pytest
import tiny_models
from tokenizers import AddedToken

from pocl_ds.data.tokenizer_digest import check_tokenizer, tokenizer_digests
from pocl_ds.errors import ModelError
from pocl_ds.models.load import load_tokenizer
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def slow_tokenizer(folder: Path, merges: str) -> Any:
    """A tokenizer in pure Python, which has no backend to serialize."""
    from transformers import CTRLTokenizer

    folder.mkdir()
    vocabulary = {"<unk>": 0, "a</w>": 1, "b</w>": 2, "ab</w>": 3, "a@@": 4}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), eos_token="<unk>")


@pytest.mark.parametrize("family", sorted(chat_families.FAMILIES))
def test_saving_and_loading_changes_nothing(family: str, tmp_path: Path) -> None:
    """The trained student is evaluated with a saved copy of its tokenizer."""
    first = load_tokenizer(str(saved(chat_families.family_tokenizer(family), tmp_path / "a")))
    second = load_tokenizer(str(saved(first, tmp_path / "b")))
    assert tokenizer_digests(first) == tokenizer_digests(second)


def test_a_slow_tokenizer_has_the_digests_of_its_files(tmp_path: Path) -> None:
    tokenizer = slow_tokenizer(tmp_path / "a", "a b</w>\n")
    before = tokenizer_digests(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_digests(type(tokenizer).from_pretrained(tmp_path / "saved")) == before
    after = tokenizer_digests(slow_tokenizer(tmp_path / "b", ""))
    assert {name for name in before if before[name] != after[name]} == {"rules"}


def swap_two_ids(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tree))


def drop_a_merge(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    del tree["model"]["merges"][0]
    path.write_text(json.dumps(tree))


def strip_left_of_a_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["added_tokens"][0]["lstrip"] = True
    path.write_text(json.dumps(tree))


def edit_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "model"))


def edit_config(name: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return edit


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (edit_template, {"chat template"}),
        (swap_two_ids, {"vocabulary"}),
        (drop_a_merge, {"rules"}),
        (strip_left_of_a_token, {"vocabulary"}),
        (edit_config("bos_token", "<|pad|>"), {"special tokens"}),
        (edit_config("model_max_length", 7), set()),
        (edit_config("pad_token", "<|endoftext|>"), set()),  # masks come from lengths
    ],
)
def test_each_change_is_named(
    edit: Callable[[Path], None], changed: set[str], tmp_path: Path
) -> None:
    folder = saved(tiny_models.make_tokenizer(chat=True), tmp_path)
    before = tokenizer_digests(load_tokenizer(str(folder)))
    edit(folder)
    after = tokenizer_digests(load_tokenizer(str(folder)))
    assert {name for name in before if before[name] != after[name]} == changed


def test_an_added_token_changes_the_vocabulary() -> None:
    tokenizer = tiny_models.make_tokenizer()
    before = tokenizer_digests(tokenizer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    assert tokenizer_digests(tokenizer)["vocabulary"] != before["vocabulary"]


def test_a_template_that_renders_the_date_is_the_same_tomorrow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The digest covers the rendering, which must not depend on the day."""
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d %H:%M:%S %f') }}" + "{{ bos_token }}"
    before = tokenizer_digests(tokenizer)
    assert tokenizer_digests(tokenizer) == before
    tokenizer.bos_token = "<|pad|>"
    assert tokenizer_digests(tokenizer)["chat template"] != before["chat template"]


def test_another_tokenizer_than_that_of_the_token_ids_raises(tmp_path: Path) -> None:
    run, folder = RunDirectory(tmp_path / "run"), tmp_path / "model"
    saved(tiny_models.make_tokenizer(chat=True), folder)
    digests = tokenizer_digests(load_tokenizer(str(folder)))
    write_manifest(run.data, "preprocess", "f", info={"tokenizers": {"student": digests}}, files=[])
    check_tokenizer(run, lambda: load_tokenizer(str(folder)), "student")
    edit_template(folder)
    swap_two_ids(folder)
    check_tokenizer(run, lambda: pytest.fail("no ids were made with it"), "teacher")
    with pytest.raises(
        ModelError,
        match=re.escape(
            f"the tokenizer of the student in {folder} is not the one that made the token ids in "
            f"{run.data} (changed: vocabulary, chat template): put "
        ),
    ):
        check_tokenizer(run, lambda: load_tokenizer(str(folder)), "student")
    with pytest.raises(ModelError, match=r"\(changed: vocabulary\): put"):
        check_tokenizer(run, lambda: load_tokenizer(str(folder)), "student", own_template=False)
