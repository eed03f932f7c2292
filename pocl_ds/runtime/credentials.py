"""Passwords, tokens and keys: refused in what is written into a run directory, blotted out of what
is shown.

A secret's place is the environment (HF_TOKEN, WANDB_API_KEY, the variable that
evaluate.judge.api_key_env names) or the file of the program that asks for it, as `hf auth login` writes
one.
"""

from __future__ import annotations

import os
import re
from typing import Any

NAME = re.compile(r"(?:^|_)(?:token|secret|password|passwd|passphrase|\w*key)$", re.IGNORECASE)
IN_ADDRESS = re.compile(r"(?<=://)[^/?#@\s'\"]+(?=@)")  # user:password, or a token alone
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[a-z]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b"
)
ASSIGNED = re.compile(
    r"\b(\w+)=(?![\"']?\$)[\"']?[^\s\"',;]"
)  # in a line of shell; not NAME=$OTHER
FEWEST_LETTERS = 12  # a shorter value stands in too many texts by chance
HIDDEN = "***"


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return NAME.search(name) is not None


def assigns_secret(line: str) -> bool:
    """Whether a line of shell, or an option of sbatch, gives a secret a value that stands in it."""
    return any(is_secret_name(found[1]) for found in ASSIGNED.finditer(line))


def hide(text: str) -> str:
    """A text without the secrets of this process's environment, passwords in addresses, and what
    looks like a token.
    """
    for value in _values():
        text = text.replace(value, HIDDEN)
    return TOKEN.sub(HIDDEN, IN_ADDRESS.sub(HIDDEN, text))


def find_secret(tree: Any, prefix: str = "") -> str | None:
    """Dotted path of the first text in a tree of plain values that holds a secret."""
    if isinstance(tree, dict):
        if any(hide(str(key)) != str(key) for key in tree):
            return prefix or "of the first level"
        return _first([(f"{prefix}.{key}".lstrip("."), value) for key, value in tree.items()])
    if isinstance(tree, (list, tuple)):
        return _first([(prefix, value) for value in tree])
    return prefix if isinstance(tree, str) and hide(tree) != tree else None


def _first(entries: list[tuple[str, Any]]) -> str | None:
    return next((found for name, value in entries if (found := find_secret(value, name))), None)


def _values() -> list[str]:
    """The longest first, since one may be part of another. The path of a key's file is none."""
    named = {
        value
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value) >= FEWEST_LETTERS
    }
    return sorted((value for value in named if not os.path.exists(value)), key=len, reverse=True)
