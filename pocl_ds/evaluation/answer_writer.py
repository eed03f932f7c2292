"""One model's answers to one benchmark: generated, scored, and written with their manifest."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl_ds.config import EvaluateConfig
from pocl_ds.data.conversation import Sample
from pocl_ds.data.sample_tokenizer import SampleTokenizer
from pocl_ds.data.thought_spans import answer_of
from pocl_ds.data.thoughts import open_thought
from pocl_ds.generation.protocol import SamplingParams, TextGenerator
from pocl_ds.metrics.rouge import rouge_l
from pocl_ds.metrics.text import exact_match
from pocl_ds.workflow.files import atomic_write
from pocl_ds.workflow.manifest import write_manifest

log = logging.getLogger("pocl_ds")

# Prompts per call of the engine, as a multiple of its concurrent sequences: enough to keep it busy,
# few enough for answers to be written often.
CALL_SIZE_FACTOR = 4


class AnswerWriter:
    """Writes one model's answers to one benchmark."""

    def __init__(
        self,
        tokenizer: SampleTokenizer,
        config: EvaluateConfig,
        settings: Mapping[str, Any],
        benchmark: str,
        model: str,
        samples: Sequence[Sample],
    ) -> None:
        self.config, self.settings = config, settings
        self.benchmark, self.model, self.samples = benchmark, model, samples
        self.prompt_texts = [tokenizer.render_prompt(sample) for sample in samples]
        self.prompts, self.cut_prompts = tokenizer.tokenize_prompts(samples)
        if self.cut_prompts:
            log.warning(
                "benchmark %s, %s: %d of %d prompts are longer than prompt.max_prompt_tokens=%d, "
                "and lost earlier turns or parts of their texts: raise it",
                benchmark,
                model,
                self.cut_prompts,
                len(samples),
                tokenizer.config.max_prompt_tokens,
            )

    def write(
        self,
        file: Path,
        generator: TextGenerator,
        seed: int,
        expected_fingerprint: str,
        advance: Callable[..., None],
    ) -> None:
        """Generate and score the answers with one seed, and write them with their manifest.

        advance: called with the number of newly finished answers.
        """
        start, tokens_before, generation_seconds = time.monotonic(), generator.processed_tokens, 0.0
        unfinished = 0
        call_size = CALL_SIZE_FACTOR * self.config.generation.max_num_seqs
        with atomic_write(file) as stream:
            for first_index in range(0, len(self.samples), call_size):
                part = slice(first_index, first_index + call_size)
                sampling = SamplingParams(
                    self.config.temperature,
                    self.config.top_p,
                    self.config.max_new_tokens,
                    seed=seed,
                    first_index=first_index,
                )
                call_start = time.monotonic()
                responses = generator.generate(
                    self.prompts[part], sampling, lambda finished: advance(finished, seed=seed)
                )
                generation_seconds += time.monotonic() - call_start
                for sample, prompt_text, response in zip(
                    self.samples[part], self.prompt_texts[part], responses, strict=True
                ):
                    record = _answer_record(
                        sample,
                        prompt_text,
                        response,
                        self.settings["rouge_tokenizer"],
                        answers_alone=self.config.span == "answer",
                    )
                    unfinished += record.get("unfinished_thought", False)
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        seconds, tokens = time.monotonic() - start, generator.processed_tokens - tokens_before
        info = {
            "benchmark": self.benchmark,
            "seed": seed,
            "settings": self.settings,
            "cut_prompts": self.cut_prompts,
            "seconds": seconds,
            "answers_per_second": len(self.samples) / seconds,
            "tokens": tokens,
            "generation_seconds": generation_seconds,
            "tokens_per_second": tokens / max(generation_seconds, 1e-9),
        }
        if unfinished:
            log.warning(
                "benchmark %s, %s: %d of %d responses do not end their thought within "
                "evaluate.max_new_tokens=%d and have no answer: raise it",
                self.benchmark,
                self.model,
                unfinished,
                len(self.samples),
                self.config.max_new_tokens,
            )
        write_manifest(
            file.parent,
            "answers",
            expected_fingerprint,
            files=[file],
            name=f"{file.name}.manifest.json",
            info=info,
        )


def _answer_record(
    sample: Sample, prompt_text: str, response: str, rouge_tokenizer: str, *, answers_alone: bool
) -> dict[str, Any]:
    """An item's line in a file of answers. Scores are between 0 and 1.

    answers_alone: compare what follows the thoughts of response and references.
    """
    compared, references = response, list(sample.references)
    thought: dict[str, Any] = {}
    if answers_alone:
        opens = open_thought(prompt_text) is not None
        compared, has_end = answer_of(response, prompt_opens_thought=opens)
        references = [answer_of(text, prompt_opens_thought=False)[0] for text in references]
        thought = {
            "unfinished_thought": not has_end,
            "answer": compared,
            "reference_answers": references,
        }
    return {
        "id": sample.id,
        **({"source": sample.source} if sample.source else {}),
        "prompt": prompt_text,
        "instruction": sample.instruction,
        "input": sample.input,
        "response": response,
        "references": sample.references,
        "rouge_l": rouge_l(compared, references, rouge_tokenizer=rouge_tokenizer),
        "exact_match": exact_match(compared, references),
        **thought,
    }
