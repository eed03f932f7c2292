"""Passwords, tokens and keys: refused in recipes and profiles, and redacted in logs and messages.

Secrets belong in environment variables (HF_TOKEN, WANDB_API_KEY, the one that
evaluate.judge.api_key_env names) or in the file of the program that uses them, as `hf auth login`
writes one.
"""

from __future__ import annotations

import os
import re
from typing import Any

from pocl_ds.runtime.token_formats import TOKEN

SECRET_NAME = re.compile(
    r"(?:^|_)(?:token|secret|pass|passwd|passphrase|credentials?|\w*password|\w*key)$|_pwd$",
    re.IGNORECASE,
)
# `user:password`, or a token alone, in front of the host of an address.
USER_INFO = re.compile(r"(?<=://)[^/?#@\s'\"]+(?=@)")
# NAME=value in a line of shell, but not NAME=$VARIABLE.
ASSIGNMENT = re.compile(r"\b(\w+)=(?![\"']?\$)[\"']?[^\s\"',;]")
MIN_LENGTH = 12  # shorter values of variables occur in too many texts by chance
REDACTED = "***"


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return SECRET_NAME.search(name) is not None


def assigns_secret(line: str) -> bool:
    """Whether a line of shell, or an option of sbatch, contains the value of a secret."""
    return any(is_secret_name(match[1]) for match in ASSIGNMENT.finditer(line))


def redact(text: str) -> str:
    """The text with *** for secrets of this process's environment, passwords in addresses, and
    strings that look like tokens.
    """
    for value in _secret_values():
        text = text.replace(value, REDACTED)
    return TOKEN.sub(REDACTED, USER_INFO.sub(REDACTED, text))


def find_secret(tree: Any, path: str = "") -> str | None:
    """Dotted path of the first text that holds a secret, in a tree of plain values; else None."""
    if isinstance(tree, dict):
        if any(redact(str(key)) != str(key) for key in tree):
            return path or "of the first level"
        children = [(f"{path}.{key}".lstrip("."), value) for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)):
        children = [(path, value) for value in tree]
    else:
        return path if isinstance(tree, str) and redact(tree) != tree else None
    secrets = (find_secret(value, name) for name, value in children)
    return next((secret for secret in secrets if secret is not None), None)


def _secret_values() -> list[str]:
    """Values of secret variables, the longest first, since one may contain another. The path of a
    key file is not a secret.
    """
    values = {
        value
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value) >= MIN_LENGTH
    }
    return sorted((value for value in values if not os.path.exists(value)), key=len, reverse=True)
