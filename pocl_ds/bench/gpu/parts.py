"""The parts of `pocl bench gpu`, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_ds.errors import RecipeError, did_you_mean

TOTAL_SECONDS = 470  # of all parts on a GPU, which leaves ten seconds for the rest


@dataclass(frozen=True)
class Part:
    """A part: a module that writes rows, and the seconds that it may take on a GPU, besides those
    that the parts before it have left.
    """

    name: str
    title: str
    limit_seconds: int
    module: str
    arguments: tuple[str, ...] = ()


def _part(name: str, title: str, limit_seconds: int, module: str, *arguments: str) -> Part:
    return Part(name, title, limit_seconds, f"pocl_ds.bench.gpu.{module}", arguments)


PARTS = (
    _part("conformance", "Conformance in bfloat16", 40, "conformance"),
    _part("loss", "Output head and divergence", 35, "loss"),
    _part("attention", "Attention on packed rows", 30, "attention"),
    *(
        _part(f"steps-{pair}", f"Optimizer steps: {title}", limit_seconds, "steps", pair)
        for pair, title, limit_seconds in (
            ("llama", "Llama 8B into 1B, 64 instruction samples", 90),
            ("llama-long", "Llama 8B into 1B, 8 samples of 2048 tokens", 80),
            ("opt", "OPT 6.7B into 1.3B, 64 instruction samples", 60),
            ("smollm2", "SmolLM2-135M into 20 of its layers, 64 instruction samples", 40),
        )
    ),
    _part("pipeline", "A whole run", 50, "pipeline"),
    _part("vllm", "vLLM: scoring, rollouts, sleep and new weights", 45, "vllm_engine"),
)


def select_parts(names: Sequence[str], parts: Sequence[Part] = PARTS) -> list[Part]:
    """The parts with these names, in their order; `steps` names every part that begins with
    `steps-`. Raises RecipeError for an unknown name.
    """
    known = {part.name for part in parts} | {part.name.partition("-")[0] for part in parts}
    for name in names:
        if name not in known:
            raise RecipeError(f"there is no part {name!r}: {did_you_mean(name, sorted(known))}")
    return [
        part
        for part in parts
        if any(part.name == n or part.name.startswith(f"{n}-") for n in names)
    ]
