"""Teacher and student of the parts `steps-*`: real shapes with random weights.

On a CPU the same pairs have tiny shapes.
"""

from __future__ import annotations

import numpy as np

from pocl_ds.bench.workloads import WORKLOADS, Workload

_LLAMA = {
    "vocab_size": 128_256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
LLAMA_8B = {
    **_LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
LLAMA_1B = {
    **_LLAMA,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}
_OPT = {"vocab_size": 50_272, "max_position_embeddings": 2048, "num_attention_heads": 32}
OPT_6_7B = {
    **_OPT,
    "hidden_size": 4096,
    "word_embed_proj_dim": 4096,
    "ffn_dim": 16_384,
    "num_hidden_layers": 32,
}
OPT_1_3B = {
    **_OPT,
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
}
_TINY_OPT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "dropout": 0.0,  # the contenders' first losses can be compared
}


def instruction_lengths(samples: int = 64, seed: int = 5) -> tuple[tuple[int, int], ...]:
    """Prompt tokens and all tokens of samples as long as those of databricks-dolly-15k: 157 tokens
    on average, of which responses are a fifth to four fifths.
    """
    source = np.random.default_rng(seed)
    totals = np.clip(source.lognormal(5.0, 0.65, samples), 24, 512).astype(int)
    prompts = np.maximum(4, (totals * source.uniform(0.15, 0.6, samples)).astype(int))
    return tuple(zip(prompts.tolist(), totals.tolist(), strict=True))


def find_pair(name: str, *, on_gpu: bool) -> Workload:
    """The models and the batch of a part `steps-NAME`."""
    tiny = WORKLOADS["tiny"]
    if not on_gpu:
        if name == "opt":
            return Workload(name, _TINY_OPT, _TINY_OPT, tiny.lengths, family="opt")
        return Workload(name, tiny.teacher, tiny.student, tiny.lengths)
    instructions, small = instruction_lengths(), WORKLOADS["A"]
    return {
        "llama": Workload(name, LLAMA_8B, LLAMA_1B, instructions),
        "llama-long": Workload(name, LLAMA_8B, LLAMA_1B, ((512, 2048),) * 8),
        "opt": Workload(name, OPT_6_7B, OPT_1_3B, instructions, family="opt"),
        "smollm2": Workload(name, small.teacher, small.student, instructions),
    }[name]
