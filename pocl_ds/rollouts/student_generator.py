"""The generator of a rank's rollouts: vLLM in its own process, or transformers in this one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from pocl_ds.config import GenerationConfig, PolicyConfig, StudentConfig
from pocl_ds.generation.protocol import Generator
from pocl_ds.generation.subprocess_generator import SubprocessGenerator
from pocl_ds.models.load import load_tokenizer
from pocl_ds.rollouts.weight_transfer import TRANSFER_NOTES, choose_weight_transfer
from pocl_ds.runtime import distributed

log = logging.getLogger("pocl_ds")

# For the log: what an engine on the rank's GPU does between rollouts, by its sleep level.
SLEEP_NOTES = {
    0: "; this machine's engine cannot sleep, so it keeps its GPU memory between rollouts",
    1: "; the engine sleeps between rollouts, with its weights in host memory",
    2: "; the engine sleeps between rollouts and drops its weights",
}
# For the log: when the responses of a step are generated, with policy.staleness=1.
AHEAD_NOTES = {
    "vllm": "; it generates the responses of a step while the step before trains, and keeps its "
    "memory meanwhile",
    "transformers": "; it generates the responses of a step before the previous step trains, "
    "which saves no time: only rollout_backend=vllm generates while a step trains",
}


def make_generator(
    config: PolicyConfig,
    settings: GenerationConfig,
    student: StudentConfig,
    model_path: str,
    *,
    max_length: int,
    end_of_turn_ids: Sequence[int],
    sleep_level: int,
    on_gpu: bool,
) -> Generator:
    """Open the student for generation. max_length, end_of_turn_ids: see `open_generator`.
    sleep_level: see `VllmGenerator`. on_gpu: vLLM shares this rank's GPU.
    """
    trust_remote_code = student.trust_remote_code
    threads = torch.get_num_threads()
    if settings.backend == "vllm":
        transfer, reason = choose_weight_transfer(config.weight_transfer, on_gpu=on_gpu)
        log.info("the student's weights reach vllm %s (%s)", TRANSFER_NOTES[transfer], reason)
        return SubprocessGenerator(
            model_path,
            settings,
            max_length=max_length,
            threads=threads,
            trust_remote_code=trust_remote_code,
            device=distributed.visible_devices() if on_gpu else None,
            sleep_level=sleep_level,
            weight_transfer=transfer,
            end_of_turn_ids=end_of_turn_ids,
        )
    from pocl_ds.generation.transformers_backend import TransformersGenerator

    return TransformersGenerator(
        model_path,
        settings,
        load_tokenizer(model_path, trust_remote_code=trust_remote_code),
        max_length=max_length,
        threads=threads,
        trust_remote_code=trust_remote_code,
        end_of_turn_ids=end_of_turn_ids,
    )


def describe_idle_time(config: PolicyConfig, generator: Generator, *, on_gpu: bool) -> str:
    """For the log: what the generator does while the student trains; may be empty."""
    if config.staleness:
        return AHEAD_NOTES[config.rollout_backend]
    if on_gpu and isinstance(generator, SubprocessGenerator):
        return SLEEP_NOTES[generator.sleep_level]
    return ""
