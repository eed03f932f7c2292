"""Registers, spills and shared memory of the loss kernel for each loss and GPU generation, and its
time where a GPU is at hand; `by token` is the kernel with a temperature and weights for each token,
and `signals` the kernel of what token rules read.

Compiling needs no GPU: Triton brings its own assembler. Each kernel is compiled for bfloat16
logits in its largest variant: masked ids, a temperature other than 1, soft caps on both sides, and
a cross-entropy beside the divergence.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pocl_ds.bench.arguments import parse_integers
from pocl_ds.config.registry import LOSSES
from pocl_ds.errors import RecipeError
from pocl_ds.losses.closed_forms import CLOSED_FORMS
from pocl_ds.losses.token_inputs import TokenInputs
from pocl_ds.losses.token_losses import LossTerms
from pocl_ds.losses.token_rules import TokenRule
from pocl_ds.losses.triton_loss import BLOCK, WARPS, KernelForm, TritonLoss, kernel_form
from pocl_ds.models.heads import OutputHead
from pocl_ds.models.vocab import VocabMap
from pocl_ds.runtime.distributed import device

# Compute capabilities, as in sm_90: A100, H100 and H200, B200.
TARGETS = (80, 90, 100)
NAMES = ("sft", *CLOSED_FORMS)
TOKENS, IDS = 2048, 128_256
# Ids of a step of the kernel's loops, and warps.
LAUNCHES = ((BLOCK, WARPS), (1024, 4), (4096, 16), (8192, 32))
ROUNDS = 10
SIGNALS = "signals"  # the kernel that is not of a loss


@dataclass(frozen=True)
class CompiledKernel:
    """What one compiled kernel occupies: registers of a thread, bytes that a thread spills to
    memory, and bytes of shared memory of a program; whether it reads 16 bytes at once, and
    whether it rounds gradients to the nearest bfloat16.
    """

    name: str
    target: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    is_vectorized: bool
    rounds_to_nearest: bool


def run(
    arguments: Sequence[int | str] = (),
    out: Callable[[str], None] = print,
    *,
    names: Sequence[str] = NAMES,
) -> list[CompiledKernel]:
    """Print and return a row for each loss and target. arguments: compute capabilities, as in
    80 90 100, the default. names: of the losses.

    Raises RecipeError for anything else, or if Triton is not installed.
    """
    targets = parse_integers(arguments, "the compute capability") or TARGETS
    out(f"bfloat16 logits, {BLOCK} ids and {WARPS} warps a step; registers and spills of a thread")
    out(f"{'kernel':<14}{'target':>8}{'reads':>7}{'registers':>11}{'spills':>9}{'shared':>9}")
    rows = []
    variants = [(name, name) for name in names]
    variants += [(f"{name} by token", name) for name in names if name != "sft"]
    for label, name in [*variants, (SIGNALS, SIGNALS)]:
        for target in targets:
            row = compile_kernel(name, target, by_token=label != name)
            rows.append(row)
            reads = 1 if name == SIGNALS else _form(name).reads
            out(
                f"{label:<14}{f'sm_{target}':>8}{reads:>7}{row.registers:>11}"
                f"{row.spill_bytes:>7} B{row.shared_bytes:>7} B"
            )
    if device().type == "cuda":
        _print_times(names, out)
    return rows


def compile_kernel(name: str, target: int, *, by_token: bool = False) -> CompiledKernel:
    """Compile the kernel of this loss, or that of `signals`, for a compute capability. by_token:
    with a temperature and weights for each token.

    Raises RecipeError if Triton is not installed.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise RecipeError("pocl bench kernels needs Triton: install triton") from error
    from pocl_ds.losses.signal_kernel import signal_kernel
    from pocl_ds.losses.triton_kernels import loss_kernel

    constants = _loss("fkl" if name == SIGNALS else name, 30.0).constants
    kernel = signal_kernel if name == SIGNALS else loss_kernel
    constants = constants | {"KD_GRADIENT": name != "sft", "CE_GRADIENT": True}
    if not by_token:
        constants |= dict.fromkeys(("inverse_taus", "kd_weights", "ce_weights"))
    if name == "sft":
        constants["teacher_products"] = None
    constants = {key: constants[key] for key in kernel.arg_names if key in constants}
    pointers = ("divergences", "cross_entropies", "signals", "inverse_taus", "kd_weights")
    strides = ("student_stride", "teacher_stride", "signal_stride", "size", "width")
    types = {
        "student_products": "*bf16",
        "teacher_products": "*bf16",
        "labels": "*i64",
        "masked": "*u8",
        **dict.fromkeys((*pointers, "ce_weights"), "*fp32"),
        **dict.fromkeys(strides, "i32"),
        **dict.fromkeys(("inverse_tau", "kd_weight", "ce_weight"), "fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    # As at a launch: rows of logits and of the mask are aligned.
    aligned = ["student_products", "teacher_products", "masked", "student_stride"]
    aligned += ["teacher_stride", "width"]
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {argument: types[argument] for argument in names},
        constants,
        {
            (names.index(argument),): [["tt.divisibility", 16]]
            for argument in aligned
            if argument not in constants
        },
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": WARPS}
    )
    ptx = compiled.asm["ptx"]
    registers, spill_bytes = _assemble(ptx, Path(triton.__file__).parent)
    is_vectorized = re.search(r"ld\.global\S*\.v4\.b32", ptx) is not None
    rounds_to_nearest = "cvt.rn.bf16" in ptx
    return CompiledKernel(
        f"{name} by token" if by_token else name,
        target,
        registers,
        spill_bytes,
        compiled.metadata.shared,
        is_vectorized,
        rounds_to_nearest,
    )


def _assemble(ptx: str, triton_directory: Path) -> tuple[int, int]:
    """Registers and spilled bytes that the assembler reports for this code."""
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    directory = triton_directory / "backends" / "nvidia" / "bin"
    blackwell = directory / "ptxas-blackwell"
    is_blackwell = int("".join(re.findall(r"\d+", target))) >= 100 and blackwell.exists()
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.ptx"
        code.write_text(ptx)
        command = [str(blackwell if is_blackwell else directory / "ptxas"), "-v"]
        command += [f"--gpu-name={target}", str(code), "-o", f"{folder}/kernel.cubin"]
        process = subprocess.run(command, text=True, capture_output=True, check=True)
    (registers,) = re.findall(r"Used (\d+) registers", process.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", process.stderr)
    return int(registers), sum(map(int, spills))


def _form(name: str) -> KernelForm:
    form = kernel_form(name, LOSSES[name])
    assert form is not None, f"{name} has a closed form but no kernel"
    return form


def _loss(
    name: str,
    soft_cap: float | None,
    block: int = BLOCK,
    warps: int = WARPS,
    rule: TokenRule | None = None,
) -> TritonLoss:
    head = OutputHead(None, None, 1.0, soft_cap, IDS)
    terms = LossTerms(name, temperature=1.5, sft_ratio=0.3, token_rule=rule)
    teacher_head = None if name == "sft" else head
    return TritonLoss(terms, LOSSES[name], VocabMap(IDS), head, teacher_head, True, block, warps)


def _print_times(names: Sequence[str], out: Callable[[str], None]) -> None:
    """Time and memory traffic of each loss, with the default launch and with others, and with a
    token rule.
    """
    out(f"\n{torch.cuda.get_device_name()}, {TOKENS} tokens x {IDS} ids, bfloat16, median")
    out(f"{'loss':<14}{'ids, warps of a step':>22}{'ms':>9}{'TB/s':>8}")
    logits: Any = [torch.randn(TOKENS, IDS, device=device()).bfloat16() for _ in range(2)]
    labels = torch.randint(0, IDS, (TOKENS,), device=device())
    tokens = TokenInputs(labels, position=torch.zeros(TOKENS, device=device()))
    rule = TokenRule.of("adakd", {"threshold": 0.2})
    for name in names:
        sides, reads = 1 if name == "sft" else 2, _form(name).reads
        variants = [(name, reads, _loss(name, None, *launch)) for launch in LAUNCHES]
        if sides == 2:
            variants.append((f"{name} with rule", reads + 1, _loss(name, None, rule=rule)))
        for label, reads, loss in variants:
            milliseconds = _median_ms(
                lambda loss=loss, sides=sides: loss(  # type: ignore[misc]
                    logits[0], logits[1] if sides == 2 else None, tokens
                )
            )
            rate = TOKENS * IDS * 2 * (reads * sides + 1) / milliseconds / 1e9
            launch_text = f"{loss.block}, {loss.warps}"
            out(f"{label:<14}{launch_text:>22}{milliseconds:>9.2f}{rate:>8.2f}")


def _median_ms(call: Callable[[], object]) -> float:
    """The median time of a call on the GPU, in milliseconds."""
    times = []
    for _ in range(ROUNDS + 1):  # the first one compiles
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])
