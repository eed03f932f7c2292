"""Quantized teachers: errors, and bitsandbytes against its own dequantized weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from pocl_ds.config import StudentConfig, TeacherConfig
from pocl_ds.data.batches import Batch
from pocl_ds.errors import ModelError, RecipeError, ResourceError
from pocl_ds.models.heads import hidden_states, output_head
from pocl_ds.models.load import load_model, load_model_config
from pocl_ds.models.quantization import (
    BYTES_PER_WEIGHT,
    bytes_per_weight,
    check_quantized_teacher,
    check_student_is_not_quantized,
    quantization_method,
)
from pocl_ds.models.vocab import VocabMap
from pocl_ds.teachers.teacher import OnlineTeacher

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


@pytest.fixture
def gptq(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model folder whose configuration names a quantization."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "gptq"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": GPTQ}))
    return folder


def test_stored_quantization(gptq: Path, tiny_llama: Path) -> None:
    config, plain = load_model_config(str(gptq)), load_model_config(str(tiny_llama))
    assert (quantization_method(config), quantization_method(plain)) == ("gptq", None)
    assert (bytes_per_weight(config, "none"), bytes_per_weight(plain, "none")) == (0.5, None)
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
    }
    assert (
        bytes_per_weight(config, "none")
        == bytes_per_weight(plain, "bnb_4bit")
        == BYTES_PER_WEIGHT["bnb_4bit"]
    )
    config.quantization_config = GPTQ
    check_quantized_teacher(TeacherConfig(model=str(gptq), ds_config=None), config)
    check_student_is_not_quantized(StudentConfig(model=str(tiny_llama)), plain)
    with pytest.raises(
        RecipeError,
        match=r"teacher.model=.*gptq has quantized weights \(gptq\).*set teacher.ds_config=null",
    ):
        check_quantized_teacher(TeacherConfig(model=str(gptq)), config)
    with pytest.raises(
        RecipeError, match=r"teacher.quantization=bnb_8bit, and .* \(gptq\): set it to none"
    ):
        check_quantized_teacher(
            TeacherConfig(model=str(gptq), ds_config=None, quantization="bnb_8bit"), config
        )
    with pytest.raises(
        ModelError,
        match=r"student.model=.* has quantized weights \(gptq\), which cannot be trained",
    ):
        check_student_is_not_quantized(StudentConfig(model=str(gptq)), config)


def test_error_names_the_package_that_a_folder_needs(gptq: Path) -> None:
    if importlib.util.find_spec("optimum") is not None:
        pytest.skip("optimum is installed: nothing is missing")
    with pytest.raises(
        ModelError, match=r"cannot be loaded \(.*pip install optimum.*\): install what it names"
    ):
        load_model(str(gptq))


def test_missing_bitsandbytes_is_an_error(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *arguments: None if name == "bitsandbytes" else find_spec(name, *arguments),
    )
    teacher, config = (
        TeacherConfig(model="t", ds_config=None, quantization="bnb_4bit"),
        load_model_config(str(tiny_llama)),
    )
    with pytest.raises(
        ResourceError, match=r"teacher.quantization=bnb_4bit needs .*pip install bitsandbytes"
    ):
        check_quantized_teacher(teacher, config)
    check_quantized_teacher(TeacherConfig(model="t"), config)


def dequantized_weight(module: Any) -> torch.Tensor | None:
    """The weights of a bitsandbytes module in float, None for any other module. Call it before the
    first forward, which packs the weights again.
    """
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear4bit):
        assert module.weight.quant_state.quant_type == "nf4"
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return module.weight.data.float() * module.weight.SCB[:, None] / 127
    return None


@pytest.mark.parametrize(("quantization", "tolerance"), [("bnb_8bit", 0.06), ("bnb_4bit", 0.03)])
def test_online_teacher_with_bitsandbytes(
    quantization: Any, tolerance: float, tmp_path: Path
) -> None:
    """8 bits also round the activations, and CPUs multiply 4-bit weights in bfloat16: hence the
    tolerance.
    """
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = tiny_models.llama(tmp_path / "t", tied=False, hidden=128)
    ids = torch.arange(2, 60)[None]
    labels = ids[0, 1:]
    places = torch.arange(len(labels))
    batch = Batch(
        ids,
        torch.ones_like(ids),
        None,
        None,
        places,
        labels,
        torch.zeros_like(labels),
        (0,),
        "train",
    )
    plain: Any = load_model(str(folder))
    with torch.no_grad():
        unquantized = batch.at_loss_positions(hidden_states(plain, *batch.inputs))

    model: Any = load_model(str(folder), quantization=quantization)
    weights = {
        name: weight
        for name, module in model.named_modules()
        if (weight := dequantized_weight(module)) is not None
    }
    assert len(weights) == 3 * 7
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight
    teacher = OnlineTeacher(model, None, VocabMap(tiny_models.VOCABULARY))
    states = teacher.outputs(batch)
    with torch.no_grad():
        expected = batch.at_loss_positions(hidden_states(plain, *batch.inputs))
    assert states.dtype == torch.float32 and not states.requires_grad
    error = float((states - expected).norm() / expected.norm())
    quantization_error = float((expected - unquantized).norm() / expected.norm())
    print(
        f"{quantization}: {error:.4f} from the dequantized weights' states, which are "
        f"{quantization_error:.4f} from those of the unquantized weights"
    )
    assert 0 < error < tolerance and quantization_error > 0.01
    with teacher.head() as head:
        assert (
            torch.equal(head.weight, output_head(plain).weight)
            and head.weight.dtype == torch.float32
        )
    stored_bytes = sum(
        part.numel() * part.element_size()
        for name in weights
        for part in [model.get_submodule(name).weight]
    )
    assert stored_bytes <= BYTES_PER_WEIGHT[quantization] * sum(
        weight.numel() for weight in weights.values()
    )
