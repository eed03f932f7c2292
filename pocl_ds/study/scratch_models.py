"""Small LLaMA models with random weights and one tokenizer, for studies that train from scratch.

As a program it writes those of the study `tasks` below a folder, a teacher and students of about
1/4, 1/10 and 1/30 of its size:

    python launch/pocl.py pocl_ds.study.scratch_models FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pocl_ds.data.tasks import generate_tasks

VOCABULARY, MAX_POSITIONS, HEADS = 640, 128, 4  # every word of the tasks becomes one token
# The usual 0.02 is for wide models: it gets a third of the tasks right after as many steps as give
# a half with this value.
INITIALIZER_RANGE = 0.07
END, PADDING = "<|endoftext|>", "<|pad|>"
TOKENIZER_SAMPLES = 4000


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA model with HEADS heads and tied embeddings."""

    hidden: int
    layers: int


SHAPES = {
    "teacher": Shape(128, 4),
    "student-quarter": Shape(64, 4),
    "student-tenth": Shape(48, 2),
    "student-thirtieth": Shape(24, 2),
}


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer (transformers) whose digits are tokens of their own, together with
    the space before them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PADDING
    )


def make_model(shape: Shape, vocabulary: int, *, end_id: int, seed: int) -> Any:
    """A LLaMA of this shape with random weights in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def write_task_models(folder: Path, *, seed: int = 0) -> None:
    """Write the models of the study `tasks`, each into a folder of its name in SHAPES."""
    samples = generate_tasks(TOKENIZER_SAMPLES)
    texts = [" ".join(message.content for message in sample.messages) for sample in samples]
    tokenizer = train_tokenizer(texts)
    for name, shape in SHAPES.items():
        model = make_model(shape, len(tokenizer), end_id=tokenizer.eos_token_id, seed=seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{folder / name}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    write_task_models(Path(sys.argv[1]))
