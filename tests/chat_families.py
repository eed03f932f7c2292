"""Tiny tokenizers with the chat templates of common model families.

The templates in `chat_templates/` are written anew: they have the structure of the families' own
templates, and shorter texts. Each tokenizer has the special tokens of its family, and the EOS token
that the published model has, which is often not the token that ends a turn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).with_name("chat_templates")
CORPUS = [
    "system user assistant model tool ipython\n\n### User:\n### Assistant:\nUSER: ASSISTANT: ",
    "It is 0.\n\nIt is 1.\nSay 0. Say 1. Weather in Rome? Weather in Oslo? The sum is four.\n",
    '{"name": "weather", "arguments": {"city": "Rome"}} {"type": "function", "function": {}}\n',
    "Below is a question. Write an answer that responds to it, step by step, and be brief.\n",
] * 8
# The split of GPT-4, Llama 3 and Qwen: punctuation takes the line breaks after it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class ChatFamily:
    """The tokenizer and the template of one family."""

    kind: str  # of tokenizer: byte_level, llama, metaspace or gemma
    eos: str
    bos: str | None = None
    pad: str | None = None
    adds_bos: bool = False
    special: tuple[str, ...] = ()  # added tokens that are special
    ordinary: tuple[str, ...] = ()  # added tokens that are not
    strips_right: bool = False  # the special tokens take the white space after them
    template: str = ""  # name of its file, if it is not the family's name


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
MISTRAL = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
QWEN_TAGS = ("<tool_call>", "</tool_call>")
DEEPSEEK = (
    *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
FAMILIES = {
    "llama2": ChatFamily("llama", "</s>", "<s>", adds_bos=True),
    "llama3": ChatFamily(
        "byte_level", "<|eot_id|>", "<|begin_of_text|>", adds_bos=True, special=LLAMA3
    ),
    "llama3_base": ChatFamily(  # as when the template is given to the base model
        "byte_level",
        "<|end_of_text|>",
        "<|begin_of_text|>",
        adds_bos=True,
        special=LLAMA3,
        template="llama3",
    ),
    "llama3_1": ChatFamily(
        "byte_level", "<|eot_id|>", "<|begin_of_text|>", adds_bos=True, special=LLAMA3
    ),
    "qwen2_5": ChatFamily(
        "byte_level", "<|im_end|>", pad="<|endoftext|>", special=CHATML, ordinary=QWEN_TAGS
    ),
    "qwen2_5_base": ChatFamily(
        "byte_level",
        "<|endoftext|>",
        pad="<|endoftext|>",
        special=CHATML,
        ordinary=QWEN_TAGS,
        template="qwen2_5",
    ),
    "qwen3": ChatFamily(
        "byte_level",
        "<|im_end|>",
        pad="<|endoftext|>",
        special=CHATML,
        ordinary=(*QWEN_TAGS, "<tool_response>", "</tool_response>", "<think>", "</think>"),
    ),
    "gemma2": ChatFamily(
        "gemma",
        "<eos>",
        "<bos>",
        "<pad>",
        adds_bos=True,
        special=("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi3": ChatFamily(
        "llama", "<|endoftext|>", "<s>", "<|endoftext|>", special=PHI3, strips_right=True
    ),
    "phi4": ChatFamily(  # with the EOS of its first release
        "byte_level",
        "<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
        special=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        strips_right=True,
    ),
    "mistral": ChatFamily("metaspace", "</s>", "<s>", adds_bos=True, special=MISTRAL),
    "deepseek_r1_distill": ChatFamily(
        "byte_level",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        adds_bos=True,
        ordinary=DEEPSEEK,
    ),
    "smollm2": ChatFamily("byte_level", "<|im_end|>", "<|im_start|>", "<|im_end|>", special=CHATML),
    "smollm3": ChatFamily("byte_level", "<|im_end|>", pad="<|im_end|>", special=CHATML),
    "generation_blocks": ChatFamily("byte_level", "<|im_end|>", special=CHATML),
    "chatml": ChatFamily("byte_level", "<|im_end|>", special=CHATML),
    "harmony": ChatFamily("byte_level", "<|return|>", pad="<|endoftext|>", special=HARMONY),
    "zephyr": ChatFamily("llama", "</s>", "<s>", "</s>", adds_bos=True),
    "vicuna": ChatFamily("llama", "</s>", "<s>", "<unk>", adds_bos=True),
    "text_only": ChatFamily("byte_level", "<|endoftext|>", "<|endoftext|>"),
}


def family_tokenizer(name: str) -> Any:
    """The tokenizer of a family (a PreTrainedTokenizerFast), with its chat template."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    tokenizer = Tokenizer.from_str(_trained(family.kind))
    named = [token for token in (family.bos, family.eos, family.pad) if token]
    strip = family.strips_right
    special = dict.fromkeys([*named, *family.special])
    tokenizer.add_special_tokens([AddedToken(t, rstrip=strip, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.ordinary])
    if family.adds_bos and family.bos:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))],
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos, pad_token=family.pad
    )
    wrapped.chat_template = (TEMPLATES / f"{family.template or name}.jinja").read_text("utf-8")
    return wrapped


@cache
def _trained(kind: str) -> str:
    """A trained tokenizer without its family's special tokens, as JSON."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = []
    tokenizer: Any = Tokenizer(models.BPE())
    if kind == "byte_level":
        split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer.model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        split = pre_tokenizers.Split(Regex(r"\n| [^\n ]*"), "isolated")  # no token of two words
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)]
        )
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 420,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind != "byte_level":
        _set_spaces(tokenizer, kind)
    tree = json.loads(tokenizer.to_str())  # the tokens of bytes are not special
    tree["added_tokens"] = tree["added_tokens"][:1]
    return json.dumps(tree)


def _set_spaces(tokenizer: Any, kind: str) -> None:
    """How a SentencePiece tokenizer writes spaces: Llama 2 and Gemma by a normalizer, newer
    conversions by a pre-tokenizer. All but Gemma's put one before a text.
    """
    from tokenizers import decoders, normalizers, pre_tokenizers

    spaces = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.pre_tokenizer = None
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = spaces
    if kind != "gemma":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
