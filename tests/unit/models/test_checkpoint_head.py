"""The output head of a checkpoint, read without the other layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from pocl_ds.errors import ModelError
from pocl_ds.models import checkpoint_head
from pocl_ds.models.checkpoint_head import load_output_head
from pocl_ds.models.heads import output_head
from pocl_ds.models.load import load_model

CPU = torch.device("cpu")


@pytest.fixture
def never_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the complete model is loaded."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the complete model is loaded")

    monkeypatch.setattr(checkpoint_head, "load_model", refuse)


def check(folder: Path) -> None:
    expected, head = (
        output_head(load_model(str(folder))),
        load_output_head(str(folder), dtype="float32", device=CPU),
    )
    assert head.weight is not None and expected.weight is not None
    assert torch.equal(head.weight, expected.weight)
    assert (head.bias is None) == (expected.bias is None)
    assert head.bias is None or torch.equal(head.bias, expected.bias)  # type: ignore[arg-type]
    assert (head.scale, head.soft_cap) == (expected.scale, expected.soft_cap)


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *tiny_models.MOE_FAMILIES])
def test_the_head_is_read_alone(family: str, never_complete: None, tmp_path: Path) -> None:
    check(tiny_models.family(tmp_path, family, layers=1))


def test_names_without_the_prefix_and_several_files(
    never_complete: None, tiny_gpt2: Path, tiny_llama_untied: Path, tmp_path: Path
) -> None:
    # GPT-2's checkpoint on the Hub begins with `wte.weight`.
    folder = shutil.copytree(tiny_gpt2, tmp_path / "gpt2")
    path = folder / "model.safetensors"
    weights = {name.removeprefix("transformer."): v for name, v in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    check(folder)

    load_model(str(tiny_llama_untied)).save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    check(tmp_path / "parts")


def test_another_checkpoint_is_loaded_completely(tiny_llama: Path, tmp_path: Path) -> None:
    """As a pickle, or with a head next to the embedding that the configuration ties it to."""
    folder = shutil.copytree(tiny_llama, tmp_path / "bin")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    check(folder)

    folder = shutil.copytree(tiny_llama, tmp_path / "both")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    check(folder)


def test_a_quantized_head_is_refused(tiny_llama_untied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama_untied, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.qweight"] = weights.pop("lm_head.weight").to(torch.int32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"^the output head of .* is quantized too \(gptq\)"):
        load_output_head(str(folder), dtype="float32", device=CPU)
