"""LoRA adapters: their modules, errors, and a merge that equals peft's."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from pocl_ds.config import LoraConfig, ModelConfig
from pocl_ds.errors import ModelError, RecipeError, ResourceError
from pocl_ds.models.converted_models import models_folder
from pocl_ds.models.load import (
    empty_model,
    load_model,
    load_model_config,
    load_tokenizer,
    resolve_model,
)
from pocl_ds.models.lora import (
    adapter_parameters,
    add_adapters,
    check_adapters,
    count_trainable_parameters,
    merge_adapters,
    save_adapter,
)
from pocl_ds.workflow.input_digests import model_files

peft = pytest.importorskip("peft")
FAMILIES = ["tiny_llama", "tiny_llama_untied", "tiny_gpt2", "tiny_opt"]


def with_adapters(folder: Path, config: LoraConfig, dtype: str = "float32") -> Any:
    """A model with adapters that are not zero."""
    model = load_model(str(folder), dtype=dtype)
    add_adapters(model, config, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def empty(folder: Path, *, trust_remote_code: bool = False) -> Any:
    config = load_model_config(str(folder), trust_remote_code=trust_remote_code)
    return empty_model(config, trust_remote_code=trust_remote_code)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_equals_that_of_peft(family: str, request: pytest.FixtureRequest) -> None:
    folder, config = request.getfixturevalue(family), LoraConfig(r=3, alpha=7)
    model = with_adapters(folder, config)
    assert (
        count_trainable_parameters(model)[0]
        == adapter_parameters(load_model(str(folder)), config)
        > 0
    )
    merged = dict(merge_adapters(model, weights(model).items()))
    # peft's wrapper around the same base and adapters.
    modules = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=modules, fan_in_fan_out=family == "tiny_gpt2"
    )
    wrapped = peft.get_peft_model(load_model(str(folder)), settings)
    wrapped.base_model.model.load_state_dict(model.state_dict())
    peft_merged = dict(wrapped.merge_and_unload().named_parameters())
    plain = dict(load_model(str(folder)).named_parameters())
    assert list(merged) == list(peft_merged) == list(plain)
    assert all(torch.equal(merged[name], peft_merged[name]) for name in merged)
    changed = {name for name in merged if not torch.equal(merged[name], plain[name])}
    assert changed == {f"{name}.weight" for name in modules}
    ids = torch.arange(2, 40)[None]
    loaded: Any = load_model(str(folder))
    loaded.load_state_dict(merged, strict=False)
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    assert list(merge_adapters(model, [])) == []  # a rank without weights


def test_the_merge_holds_one_layer_at_a_time(tiny_gpt2: Path) -> None:
    """When a weight arrives, only the rest of its layer was requested: weight, bias, A, B."""
    model = with_adapters(tiny_gpt2, LoraConfig(r=2))
    state, requested = weights(model), list[str]()

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in state.items():
            requested.append(name)
            yield name, weight

    arrived = 0
    for _ in merge_adapters(model, gather()):
        arrived += 1
        adapters = sum("lora_" in name for name in requested)
        assert len(requested) - adapters - arrived <= 1  # a bias
    assert arrived == len(state) - sum("lora_" in name for name in state)


def test_the_merge_rounds_once(tiny_llama: Path) -> None:
    model = with_adapters(tiny_llama, LoraConfig(r=2), "bfloat16")
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    layer = model.model.layers[0].mlp.up_proj
    change = (
        layer.lora_B["default"].weight.float()
        @ layer.lora_A["default"].weight.float()
        * layer.scaling["default"]
    )
    merged_weight = dict(merge_adapters(model, weights(model).items()))[
        "model.layers.0.mlp.up_proj.weight"
    ]
    assert torch.equal(merged_weight, (layer.base_layer.weight.float() + change).bfloat16())


def test_adapters_depend_on_the_seed_and_change_nothing_at_first(tiny_gpt2: Path) -> None:
    models: list[Any] = [load_model(str(tiny_gpt2)) for _ in range(3)]
    state = torch.get_rng_state()
    messages = [
        add_adapters(model, LoraConfig(target_modules=("c_attn", "mlp.c_proj")), seed)
        for model, seed in zip(models, (1, 1, 2))
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert (
        messages[0]
        == "LoRA: 0.0 of 0.2 million parameters are trained (r 16, alpha 32, on c_attn, c_proj)"
    )
    initial, same_seed, other_seed = (weights(model) for model in models)
    assert all(torch.equal(initial[name], same_seed[name]) for name in initial)
    assert any(not torch.equal(initial[name], other_seed[name]) for name in initial)
    trained = [name for name, parameter in models[0].named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)
    ids = torch.arange(2, 40)[None]
    assert torch.equal(
        models[0].eval()(input_ids=ids).logits, load_model(str(tiny_gpt2))(input_ids=ids).logits
    )


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            ("query",),
            (
                "student.lora.target_modules names query",
                "q_proj, k_proj, v_proj, o_proj, gate_proj",
                "all-linear",
            ),
        ),
        (("q_proj", "input_layernorm"), ("names input_layernorm", "not a linear module")),
        (("proj",), ("names proj,", "not a linear module")),
        (("lm_head",), ("names lm_head", "leave it out")),
        (("q_proj", "embed_tokens"), ("names embed_tokens", "leave it out")),
    ],
)
def test_modules_without_adapters_are_refused(
    targets: tuple[str, ...], words: tuple[str, ...], tiny_llama: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_adapters(empty(tiny_llama), LoraConfig(target_modules=targets))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.usefixtures("modules_of_models")
def test_custom_code_model_can_have_adapters(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tiny_models.add_custom_code(Path(shutil.copytree(tiny_llama, tmp_path / "own")))
    with pytest.raises(RecipeError, match="nothing_of_it"):
        check_adapters(
            empty(folder, trust_remote_code=True), LoraConfig(target_modules=("nothing_of_it",))
        )


def test_missing_peft_is_an_error(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *arguments: None if name == "peft" else find_spec(name, *arguments),
    )
    with pytest.raises(
        ResourceError, match=r"student.lora needs the package peft.*pip install 'pocl_ds\[lora\]'"
    ):
        check_adapters(empty(tiny_llama), LoraConfig())


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an adapter of `tiny_llama`, and an empty cache of models."""
    monkeypatch.setenv("POCL_CACHE", str(tmp_path / "cache"))
    model = with_adapters(tiny_llama, LoraConfig(r=3, alpha=7))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(model, weights(model), folder, base_model=str(tiny_llama))
    edit(folder)
    return folder


def test_an_adapter_alone_is_a_model(adapter: Path, tiny_llama: Path) -> None:
    """It equals the merge of peft, which loads the folder too, and is merged once."""
    path = resolve_model(ModelConfig(model=str(adapter)))
    assert Path(path).parent == models_folder()
    merged = dict(load_model(path).named_parameters())
    wrapped = peft.PeftModel.from_pretrained(load_model(str(tiny_llama)), str(adapter))
    expected = dict(wrapped.merge_and_unload().named_parameters())
    assert list(merged) == list(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    original = dict(
        merge_adapters(
            model := with_adapters(tiny_llama, LoraConfig(r=3, alpha=7)), weights(model).items()
        )
    )
    assert all(torch.equal(merged[name], original[name]) for name in merged)
    text = "Explain what the function does."
    assert load_tokenizer(path)(text) == load_tokenizer(str(tiny_llama))(text)
    before = (Path(path) / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(ModelConfig(model=str(adapter))) == path
    assert (Path(path) / "model.safetensors").stat().st_mtime_ns == before
    # Another alpha is another model, and so is another base.
    edit(adapter, lora_alpha=14)
    assert resolve_model(ModelConfig(model=str(adapter))) != path
    edit(adapter, lora_alpha=7)
    assert resolve_model(ModelConfig(model=str(adapter))) == path
    copy = shutil.copytree(tiny_llama, adapter.parent / "base")
    edit(adapter, base_model_name_or_path=str(copy))
    assert resolve_model(ModelConfig(model=str(adapter))) != path


def edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_adapters_that_cannot_be_merged(adapter: Path, tiny_llama: Path, tiny_gpt2: Path) -> None:
    source = ModelConfig(model=str(adapter))
    for base, words in [
        (str(tiny_gpt2), "cannot be merged with .* the model that it was trained on"),
        (str(adapter / "nothing"), "the base model of the adapter .* does not exist"),
        ("", "does not name the adapter's base model"),
    ]:
        edit(adapter, base_model_name_or_path=base)
        with pytest.raises(ModelError, match=words):
            resolve_model(source)
    edit(adapter, base_model_name_or_path=str(tiny_llama))
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be merged"):
        resolve_model(source)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        resolve_model(source)
    (adapter / "adapter_config.json").write_text("[")
    with pytest.raises(ModelError, match="adapter_config.json cannot be read"):
        resolve_model(source)
    # Prompt tuning changes no weights.
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompts = peft.get_peft_model(load_model(str(tiny_llama)), settings)
    prompts.save_pretrained(str(adapter))
    edit(adapter, base_model_name_or_path=str(tiny_llama))
    with pytest.raises(ModelError, match="PROMPT_TUNING, which does not change weights"):
        resolve_model(source)
    assert not [p for p in models_folder().iterdir() if not p.name.endswith(".lock")]


def test_weights_that_do_not_match_are_refused(adapter: Path) -> None:
    """peft merges the others with a warning at most."""
    source, path = ModelConfig(model=str(adapter)), adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(ModelError, match=r"lacks weights \(.*lora_.*weight\): get the complete"):
        resolve_model(source)
    extra = {f"layers.9.{key}": tensors[name].clone() for key in "xy"}
    save_file({**tensors, **extra}, path)
    with pytest.raises(ModelError, match=r"has no place \(layers.9.x and 1 more\): give the"):
        resolve_model(source)


def test_a_chain_of_adapters_without_a_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    for bases in ((adapter, adapter), (other, adapter), (other, other)):
        for folder, base in zip((adapter, other), bases, strict=True):
            edit(folder, base_model_name_or_path=str(base))
        source = ModelConfig(model=str(adapter))
        model_files(source)  # ends
        with pytest.raises(ModelError, match="set base_model_name_or_path to a complete model"):
            resolve_model(source)


def test_a_changed_base_is_noticed(adapter: Path, tiny_llama: Path) -> None:
    copy = shutil.copytree(tiny_llama, adapter.parent / "base")
    edit(adapter, base_model_name_or_path=str(copy))
    digests = model_files(ModelConfig(model=str(adapter)))
    assert {Path(name).parent for name in digests} == {adapter, copy}
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert model_files(ModelConfig(model=str(adapter))) != digests
