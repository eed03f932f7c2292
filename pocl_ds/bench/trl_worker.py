"""TRL's GKD trainer with lmbda=0 (responses of the dataset only) on the same models and batch. It
needs TRL, not this package.

    PYTHON_WITH_TRL trl_worker.py FOLDER STEPS OUT
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

Samples = list[tuple[int, list[int]]]  # prompt tokens, and the ids of prompt and response
PAD, IGNORED = 2, -100


class Clock(TrainerCallback):
    """Seconds from the start to the end of each optimizer step."""

    def __init__(self, on_gpu: bool) -> None:
        self.seconds: list[float] = []
        self.wait = torch.cuda.synchronize if on_gpu else lambda: None

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.wait()
        self.start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.wait()
        self.seconds.append(time.perf_counter() - self.start)


def collate(batch: Samples) -> dict[str, torch.Tensor]:
    """The batch as GKDTrainer reads it, padded to the longest sample."""
    width = max(len(ids) for _, ids in batch)
    pad = lambda ids, value: ids + [value] * (width - len(ids))  # noqa: E731
    columns = {
        "input_ids": [pad(ids, PAD) for _, ids in batch],
        "attention_mask": [pad([1] * len(ids), 0) for _, ids in batch],
        "labels": [pad([IGNORED] * prompt + ids[prompt:], IGNORED) for prompt, ids in batch],
    }
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    # The trainer uses the width of the prompts as the start of the responses.
    shortest = max(1, min(prompt for prompt, _ in batch))
    tensors["prompts"] = tensors["input_ids"][:, :shortest]
    tensors["prompt_attention_mask"] = tensors["attention_mask"][:, :shortest]
    return tensors


def time_trainer(
    student: Any, teacher: Any, tokenizer: Any, batch: Samples, folder: Path, steps: int
) -> list[float]:
    """Seconds of `steps` optimizer steps, on the GPU if the student is there."""
    from datasets import Dataset

    on_gpu = student.device.type == "cuda"
    clock = Clock(on_gpu)
    config = GKDConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(batch),
        max_steps=steps,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        learning_rate=1e-4,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        bf16=on_gpu,
        disable_tqdm=True,
    )
    # The collator above ignores the rows, which only have to pass the trainer's own tokenizing.
    chat = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        processing_class=tokenizer,
        callbacks=[clock],
        train_dataset=Dataset.from_list([{"messages": chat}] * len(batch) * steps),
    )
    trainer.data_collator = lambda _: collate(batch)
    trainer.train()
    return clock.seconds


def main(folder: Path, steps: int, out: Path) -> None:
    """Time steps on the CPU in float32, after one that does not count."""
    batch = json.loads((folder / "steps.json").read_text())[0]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    seconds = time_trainer(student, teacher, tokenizer, batch, folder, steps + 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out.write_text(json.dumps({"seconds": seconds[1:], "peak_mib": peak, "loss": []}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
