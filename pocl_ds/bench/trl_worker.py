"""TRL's GKD trainer with lmbda=0 (responses of the dataset only) on the same models and batch. It
needs TRL, not this package.

    PYTHON_WITH_TRL trl_worker.py FOLDER STEPS OUT
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

try:
    from trl.experimental.gkd import GKDConfig, GKDTrainer
except ImportError:
    from trl import GKDConfig, GKDTrainer


class Clock(TrainerCallback):
    """Seconds from the start to the end of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def main(folder: Path, steps: int, out: Path) -> None:
    batch = json.loads((folder / "steps.json").read_text())[0]
    width = max(len(ids) for _, ids in batch)

    def collate(rows: list) -> dict:
        pad = lambda ids, value: ids + [value] * (width - len(ids))  # noqa: E731
        columns = {
            "input_ids": [pad(ids, 2) for _, ids in batch],
            "attention_mask": [pad([1] * len(ids), 0) for _, ids in batch],
            "labels": [pad([-100] * prompt + ids[prompt:], -100) for prompt, ids in batch],
        }
        tensors = {name: torch.tensor(values) for name, values in columns.items()}
        # The trainer uses the width of the prompts as the start of the responses.
        shortest = min(prompt for prompt, _ in batch)
        tensors["prompts"] = tensors["input_ids"][:, :shortest]
        tensors["prompt_attention_mask"] = tensors["attention_mask"][:, :shortest]
        return tensors

    models = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    ]
    clock = Clock()
    config = GKDConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(batch),
        max_steps=steps + 1,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        learning_rate=1e-4,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        bf16=False,
        disable_tqdm=True,
    )
    from datasets import Dataset

    chat = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    trainer = GKDTrainer(
        model=models[0],
        teacher_model=models[1],
        args=config,
        processing_class=tokenizer,
        callbacks=[clock],
        train_dataset=Dataset.from_list([{"messages": chat}] * len(batch) * (steps + 1)),
    )
    trainer.data_collator = collate
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out.write_text(json.dumps({"seconds": clock.seconds[1:], "peak_mib": peak, "loss": []}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
