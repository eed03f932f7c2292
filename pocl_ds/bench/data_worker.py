"""One contender of `pocl bench data`: prints the seconds and the CPU seconds of its work."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

from pocl_ds.bench.data import MAP_WITH_MASK, POCL
from pocl_ds.config import DataConfig, PromptConfig
from pocl_ds.models.load import load_tokenizer

PROMPT = PromptConfig(template="chat", max_prompt_tokens=1024, max_length=2048)


def preprocess_records(source: Path, tokenizer: Any, processes: int, work: Path) -> None:
    """What `pocl preprocess` does."""
    from pocl_ds.data.preprocess import preprocess
    from pocl_ds.workflow.run_dir import RunDirectory

    data = DataConfig(source=str(source), num_workers=processes)
    preprocess(RunDirectory(work / "run"), data, PROMPT, tokenizer, "0" * 64)


def map_records(source: Path, tokenizer: Any, processes: int, work: Path, *, mask: bool) -> Any:
    """Render and tokenize with `datasets.map`."""
    import datasets

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        def encode(conversations: list[Any], *, prompt: bool) -> list[list[int]]:
            rendered = [
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
                for messages in conversations
            ]
            ids: list[list[int]] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            return ids

        columns = {"input_ids": encode(batch["messages"], prompt=False)}
        if mask:
            prompts = encode([messages[:-1] for messages in batch["messages"]], prompt=True)
            columns["completion_mask"] = [
                [0] * len(prompt) + [1] * (len(ids) - len(prompt))
                for prompt, ids in zip(prompts, columns["input_ids"], strict=True)
            ]
        return columns

    datasets.disable_progress_bars()
    records = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(work)
    )
    return records.map(
        tokenize,
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=records.column_names,
    )


def main(contender: str, processes: str, source: str, tokenizer: str, work: str) -> None:
    """Run one contender, after its imports."""
    loaded = load_tokenizer(tokenizer)
    if contender == POCL:
        import pocl_ds.data.preprocess  # noqa: F401
    else:
        import datasets  # noqa: F401
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    if contender == POCL:
        preprocess_records(Path(source), loaded, int(processes), Path(work))
    else:
        mask = contender == MAP_WITH_MASK
        map_records(Path(source), loaded, int(processes), Path(work), mask=mask)
    print(time.perf_counter() - start, _cpu_seconds() - cpu_start)


def _cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main(*sys.argv[1:])
