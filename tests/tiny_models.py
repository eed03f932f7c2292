"""Tiny random language models as Hugging Face folders, made in a second, for the tests to distil.

Other processes import this too (`PYTHONPATH=tests`). All but the SentencePiece models share one
byte-level BPE tokenizer, so any two make a pair.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EOS, PAD, MAX_POSITIONS, VOCABULARY = "<|endoftext|>", "<|pad|>", 512, 320

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context.",
    "### Instruction: ### Input: ### Response: Explain what the function does. Return the sum of "
    "the values.",
    "The quick brown fox jumps over the lazy dog while the student learns from the teacher, step "
    "by step.",
] * 4


HIDDEN = 64
# The configuration of each family, with the scaling and capping of its logits, and with tied heads
# if real models of the family have them.
_DECODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": HIDDEN, "n_head": 2, "n_positions": MAX_POSITIONS, "initializer_range": 0.1},
    "opt": {
        "hidden_size": HIDDEN,
        "ffn_dim": 2 * HIDDEN,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
        "init_std": 0.1,
    },
    "llama": {**_DECODER, "tie_word_embeddings": False},
    "qwen2": {**_DECODER, "tie_word_embeddings": True},
    "qwen3": {**_DECODER, "tie_word_embeddings": True},
    "mistral": {**_DECODER, "sliding_window": 16},
    "gemma": _DECODER,
    "gemma2": {
        **_DECODER,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
    },
    "phi": {**_DECODER, "num_key_value_heads": 2},
    "granite": {
        **_DECODER,
        "logits_scaling": 8.0,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": True,
    },
    "cohere": {**_DECODER, "logit_scale": 0.25},
}


# Families with a mixture of experts.
MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_DECODER,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}


def make_tokenizer(*, vocabulary: int = VOCABULARY, chat: bool = False) -> Any:
    """A byte-level BPE tokenizer: id 0 is EOS, 1 is padding, then the 256 bytes, then merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_sentencepiece_tokenizer() -> Any:
    """A tokenizer like that of LLaMA 2: U+2581 for a space, also before the text, and byte tokens
    for unknown characters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tree = json.loads(tokenizer.to_str())  # byte tokens are not special tokens
    tree["added_tokens"] = tree["added_tokens"][:3]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=MAX_POSITIONS,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def llama(
    folder: Path,
    *,
    tied: bool = True,
    layers: int = 3,
    hidden: int = 64,
    seed: int = 0,
    rows: int | None = None,
    tokenizer: Any = None,
) -> Path:
    """LLaMA with grouped-query attention and a chat template; `rows` pads the vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(
        folder,
        LlamaForCausalLM,
        LlamaConfig,
        seed,
        rows,
        chat=True,
        tokenizer=tokenizer,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tied,
    )


def gpt2(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
    dropout: float = 0.1,
    tokenizer: Any = None,
) -> Path:
    """GPT-2: learned positions, tied head, and dropout like the real model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _save(
        folder,
        GPT2LMHeadModel,
        GPT2Config,
        seed,
        None,
        n_embd=hidden,
        n_layer=layers,
        n_head=hidden // 32,
        n_positions=MAX_POSITIONS,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        tokenizer=tokenizer,
    )


def opt(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    projection: int | None = 32,
    seed: int = 0,
    tokenizer: Any = None,
) -> Path:
    """OPT, with `projection` like OPT-350M: embeddings projected in and out, norms after the
    layers.
    """
    from transformers import OPTConfig, OPTForCausalLM

    return _save(
        folder,
        OPTForCausalLM,
        OPTConfig,
        seed,
        None,
        hidden_size=hidden,
        ffn_dim=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=MAX_POSITIONS,
        word_embed_proj_dim=projection or hidden,
        do_layer_norm_before=projection is None,
        tokenizer=tokenizer,
    )


def longrope(folder: Path) -> Path:
    """Phi-3 with LongRoPE: other frequencies for sequences of more than 64 tokens."""
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [1.0 + index / 2 for index in range(16)],
        "original_max_position_embeddings": 64,
    }
    decoder = {name: value for name, value in _DECODER.items() if name != "initializer_range"}
    return _save(
        folder,
        Phi3ForCausalLM,
        Phi3Config,
        0,
        None,
        chat=True,
        **decoder,
        num_hidden_layers=2,
        original_max_position_embeddings=64,
        rope_parameters=rope,
    )


def dynamic_ntk(folder: Path) -> Path:
    """LLaMA with dynamic NTK scaling: own frequencies for each length of more than 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    decoder = {name: value for name, value in _DECODER.items() if name != "initializer_range"}
    return _save(
        folder,
        LlamaForCausalLM,
        LlamaConfig,
        0,
        None,
        chat=True,
        **{**decoder, "max_position_embeddings": 64},
        num_hidden_layers=2,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    )


def family(folder: Path, name: str, *, layers: int, seed: int = 0) -> Path:
    """A model of `FAMILIES` or `MOE_FAMILIES` with random biases and norms: zeros and ones would
    hide mistakes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(chat=True)
    depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
    config = AutoConfig.for_model(
        name,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**{**FAMILIES, **MOE_FAMILIES}[name], depth: layers},
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _save(
    folder: Path,
    model_class: Any,
    config_class: Any,
    seed: int,
    rows: int | None,
    *,
    chat: bool = False,
    tokenizer: Any = None,
    **fields: Any,
) -> Path:
    import torch

    tokenizer = tokenizer or make_tokenizer(chat=chat)
    spread = "initializer_range" if model_class.__name__ != "OPTForCausalLM" else "init_std"
    # Wider than the usual 0.02, so that greedy decoding has no ties.
    config = config_class(
        vocab_size=rows or len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{spread: 0.1},
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CUSTOM_CODE = {
    "custom_config.py": (
        "from transformers import LlamaConfig\n\n\n"
        "class CustomConfig(LlamaConfig):\n    model_type = 'custom'\n"
    ),
    "custom_model.py": (
        "from transformers import LlamaForCausalLM\n\n"
        "from .custom_config import CustomConfig\n\n\n"
        "class CustomModel(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    ),
}


def add_custom_code(folder: Path) -> Path:
    """Turn a LLaMA's folder into one of a family that only its custom code defines."""
    tree = json.loads((folder / "config.json").read_text())
    tree |= {
        "model_type": "custom",
        "architectures": ["CustomModel"],
        "auto_map": {
            "AutoConfig": "custom_config.CustomConfig",
            "AutoModelForCausalLM": "custom_model.CustomModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(tree))
    for name, text in CUSTOM_CODE.items():
        (folder / name).write_text(text)
    return folder
