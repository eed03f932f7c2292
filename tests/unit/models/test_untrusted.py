"""Untrusted models: weights are read as data, and custom code runs only if the recipe trusts it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pocl_ds.config import ModelSource
from pocl_ds.errors import ModelError
from pocl_ds.models.load import load_model, load_model_config, load_tokenizer

LOADERS = (load_model, load_model_config, load_tokenizer)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def with_bin(model: Path, target: Path, **extra: Any) -> Path:
    """Copy a model and store its weights as a pickle."""
    shutil.copytree(model, target)
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    torch.save({**weights, **extra}, target / "pytorch_model.bin")
    return target


def test_pickled_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    assert load_model(str(with_bin(tiny_llama, tmp_path / "plain"))).config.num_hidden_layers == 3
    marker = tmp_path / "marker"
    folder = with_bin(tiny_llama, tmp_path / "trapped", trap=Trap(marker))
    with pytest.raises(
        ModelError,
        match=r"the model of .*trapped cannot .*more than data: \S*mkdir; its code was not run",
    ):
        load_model(str(folder))
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the trap itself works"


def with_code(model: Path, target: Path, marker: Path) -> Path:
    """Copy a model and make it need custom classes."""
    shutil.copytree(model, target)
    for name, entries in (
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
    ):
        tree = json.loads((target / name).read_text())
        tree.pop("tokenizer_class", None)
        (target / name).write_text(json.dumps({**tree, "model_type": "own", "auto_map": entries}))
    (target / "own.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\nraise ImportError('own code ran')\n"
    )
    return target


@pytest.mark.usefixtures("modules_of_models")
@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_custom_code_runs_only_if_trusted(
    load: Callable[..., Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("it asks for input, but a batch job has none")
    )
    marker = tmp_path / "marker"
    folder = with_code(tiny_llama, tmp_path / "model", marker)
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(str(folder))
    assert not marker.exists()
    with pytest.raises(ModelError, match="own code ran"):
        load(str(folder), trust_remote_code=True)
    assert marker.exists(), "the trap itself works"


def test_trust_is_off_by_default() -> None:
    assert not ModelSource(model="x").trust_remote_code
