"""Data, tokenizer and models for a whole run without a download: words made of random syllables,
and models with random weights.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pocl_ds.models.quiet import quiet
from pocl_ds.runtime import distributed
from pocl_ds.workflow.files import atomic_write

EOS = "<|endoftext|>"
POSITIONS = 1024
SYLLABLES = ("ka", "lo", "mi", "ren", "tus", "va", "por", "shi", "den", "ula")


def write_samples(path: Path, count: int) -> None:
    """Write instruction samples as JSON lines: an answer repeats words of its instruction."""
    source = random.Random(0)
    with atomic_write(path) as file:
        for _ in range(count):
            words = [
                "".join(source.choices(SYLLABLES, k=source.randint(1, 3)))
                for _ in range(source.randint(8, 90))
            ]
            answer = " ".join(words[: source.randint(2, len(words))])
            sample = {"instruction": "Repeat: " + " ".join(words), "output": answer}
            file.write(json.dumps(sample) + "\n")


def make_tokenizer(texts: Path, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer trained on a file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(texts)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, model_max_length=POSITIONS
    )


def write_random_model(folder: Path, tokenizer: Any, *, layers: int, width: int, seed: int) -> None:
    """Write a Llama model with heads of width 64 (32 if it is narrow), in bfloat16 on a GPU."""
    device = distributed.device()
    heads = width // (64 if width >= 256 else 32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    with device, quiet():
        model = LlamaForCausalLM(config)
        model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
