"""What a tokenizer is, as digests: by them a step notices that the token ids on disk were made with
another tokenizer or chat template, whatever changed it (files, a release of transformers, a copy).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pocl_ds.errors import ModelError
from pocl_ds.workflow.manifest import read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

# Letters, digits, spaces, punctuation, and scripts that tokenizers split differently.
PROBE_TEXT = "The year 2024:  don't\n\n\tdéjà vu — Привет, 你好世界 😀 x<|im_end|></s>[INST]"
PROBE_CONVERSATIONS = (
    [("user", "One?")],
    [("system", "Be brief."), ("user", "One?")],
    [("user", "One?"), ("assistant", "Two."), ("user", " Three?\n"), ("assistant", "Four.")],
)
CHAT_TEMPLATE = "chat template"  # the name of a part
# Not among the rules of a fast tokenizer: settings of a batch, and what its vocabulary covers.
LEFT_OUT = ("padding", "truncation", "added_tokens")


def tokenizer_digests(tokenizer: Any) -> dict[str, str]:
    """sha256 of each part of a tokenizer: its vocabulary, rules, special tokens and chat template.

    Saving and loading it changes none of them.
    """
    added = {
        number: [token.content, token.special, token.normalized, token.lstrip, token.rstrip]
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    probe = tokenizer(PROBE_TEXT)["input_ids"]
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    parts = {
        "vocabulary": [sorted(tokenizer.get_vocab().items()), sorted(added.items())],
        "rules": [_rules(tokenizer), tokenizer.convert_ids_to_tokens(probe)],
        "special tokens": special,
        CHAT_TEMPLATE: [tokenizer.chat_template, _rendered_probes(tokenizer)],
    }
    return {name: _sha256(value) for name, value in parts.items()}


def check_tokenizer(
    run: RunDirectory,
    load: Callable[[], Any],
    owner: Literal["student", "teacher"],
    *,
    own_template: bool = True,
) -> None:
    """Check that a model's tokenizer is the one that `preprocess` made the token ids with.

    load: called unless the tokenizer made none, as that of most teachers. own_template: false if
    the model read prompts by the chat template of another one. Raises ModelError that names what
    changed.
    """
    manifest = read_manifest(run.data)
    recorded = manifest.info.get("tokenizers", {}).get(owner) if manifest else None
    if recorded is None:
        return
    tokenizer = load()
    digests = tokenizer_digests(tokenizer)
    if not own_template:
        del digests[CHAT_TEMPLATE]
    changed = [name for name, digest in digests.items() if recorded.get(name) != digest]
    if changed:
        raise ModelError(
            f"the tokenizer of the {owner} in {tokenizer.name_or_path} is not the one that made "
            f"the token ids in {run.data} (changed: {', '.join(changed)}): put the tokenizer and "
            "the versions of transformers and tokenizers back, or choose another --run-dir"
        )


def _rules(tokenizer: Any) -> Any:
    """How text is split and merged: the state of a fast tokenizer, else the files of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        model = {
            name: value
            for name, value in state["model"].items()
            if name != "vocab" or isinstance(value, list)
        }
        return {**{k: v for k, v in state.items() if k not in LEFT_OUT}, "model": model}
    # A tokenizer with its own code may write no files; its probe still counts.
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(NotImplementedError, OSError, ValueError):
            tokenizer.save_vocabulary(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]


def _rendered_probes(tokenizer: Any) -> list[str | None]:
    """Conversations as the chat template renders them; None for one that it refuses."""
    return [
        _rendered_probe(tokenizer, [{"role": role, "content": text} for role, text in turns])
        for turns in PROBE_CONVERSATIONS
    ]


def _rendered_probe(tokenizer: Any, messages: list[Mapping[str, str]]) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=messages[-1]["role"] == "user",
            strftime_now=lambda _format: "today",  # a template may render the date
        )
    except Exception:  # a template raises what it likes, and jinja2 many types
        return None
    return str(text)


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
