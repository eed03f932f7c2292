"""On-policy responses: the student generates while it is trained.

Each rank has its own generator with a copy of the student, outside of ZeRO-3: vLLM in a process
next to the rank, or transformers in the rank's process. The generator receives the student's
weights every `policy.sync_weights_every` steps. After each transfer the log-probability of the
batch's longest response is compared with the trainer's, to detect a generator that did not load all
new weights.

With `policy.staleness: 1` the responses of a step are requested before the step that precedes it
trains, with the weights of that moment. vLLM generates them while that step trains; transformers,
which shares the process, before. So both train on the same kind of responses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocl_ds.config import GenerationConfig, PolicyConfig, StudentConfig
from pocl_ds.curriculum.sampler import SamplerPosition
from pocl_ds.data.generated import GeneratedBatch, TokenizedDataset
from pocl_ds.data.tokenized import shard_rows
from pocl_ds.engines.protocol import Engine
from pocl_ds.errors import ResourceError
from pocl_ds.generation.backends import longest_sequence
from pocl_ds.generation.invariance import check_generator, choose_rows
from pocl_ds.generation.protocol import Generator, SamplingParams
from pocl_ds.models.batch_invariance import GPU_TOLERANCE, TOLERANCE
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.load import load_tokenizer
from pocl_ds.models.lora import merge_adapters
from pocl_ds.models.vocab import VocabMap
from pocl_ds.rollouts.pending import PendingRollout, Responses, start_generation
from pocl_ds.rollouts.student_generator import describe_idle_time, make_generator
from pocl_ds.rollouts.student_log_probs import student_log_probs
from pocl_ds.rollouts.weight_transfer import copy_to_host, send_weights
from pocl_ds.runtime import distributed
from pocl_ds.runtime.progress import LOG_INTERVAL, Progress

log = logging.getLogger("pocl_ds")

WEIGHTS_FILE = "rollout_weights.pt"  # in a checkpoint
NO_WEIGHTS = -1  # `weights_step` of a generator without weights


@dataclass
class RolloutStats:
    """Time and size of one step's rollout. With `policy.staleness: 1` most of its `seconds` may
    belong to the step before.
    """

    seconds: float = 0.0  # of weight transfer and generation
    weight_sync_seconds: float = 0.0  # part of `seconds`: weight transfer and comparison
    wait_seconds: float = 0.0  # that the step waited for its own rollout and for starting the next
    tokens: int = 0  # generated, over all ranks
    staleness_steps: int = 0  # optimizer steps since the generator got its weights


@dataclass
class RolloutWorker:
    """Generates the student's responses on all ranks. All ranks call every method together."""

    config: PolicyConfig
    student: StudentConfig
    model_path: str
    engine: Engine
    dataset: TokenizedDataset
    vocab: VocabMap
    seed: int
    max_length: int  # tokens of a prompt and its response
    end_of_turn_ids: Sequence[int] = ()  # see `open_generator`; the first ends an empty response
    stats: RolloutStats = field(default_factory=RolloutStats)
    generator: Generator | None = None
    weights_step: int = NO_WEIGHTS  # the optimizer step whose weights the generator has
    invariance: dict[str, Any] | None = (
        None  # what `check_generator` found before the first rollout
    )
    # The generator's weights on rank 0, for checkpoints; empty if every step brings new ones.
    saved_weights: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    ahead: PendingRollout | None = None  # the responses of the next step
    # The response of the latest `_check_weights`: tokens, its start, and its nats in the generator.
    checked: tuple[list[int], int, float] | None = None

    def __post_init__(self) -> None:
        tokenizer = load_tokenizer(
            self.model_path, trust_remote_code=self.student.trust_remote_code
        )
        self.end_of_turn_ids = list(self.end_of_turn_ids) or [int(tokenizer.eos_token_id)]
        self.allowed = self.vocab.allowed
        self.module: Any = self.engine.module
        self.on_gpu = distributed.device().type == "cuda"
        # The generator allows no more than the data needs: vLLM's limit changes LongRoPE's factors.
        longest = longest_sequence(self.dataset, self.config.max_new_tokens)
        self.generator_length = min(self.max_length, longest)

    def generate(self, rows: NDArray[np.int64], position: SamplerPosition) -> GeneratedBatch:
        """Generate the student's responses to the prompts of some rows, or take those that
        `generate_ahead` requested; the result is the same on all ranks. A response depends only on
        seed, step, its index in `rows`, and the generator's weights.
        """
        start = time.monotonic()
        rollout = self._take_ahead(rows, position.step)
        if rollout is None:
            rollout = self._start(rows, position.step, now=position.step, in_background=False)
        responses = rollout.collect()
        generated = GeneratedBatch.from_responses(
            self.dataset,
            rows,
            responses,
            end_of_turn_id=self.end_of_turn_ids[0],
            max_length=self.max_length,
            allowed=self.allowed,
        )
        self.stats = RolloutStats(
            seconds=rollout.weight_sync_seconds + rollout.seconds,
            weight_sync_seconds=rollout.weight_sync_seconds,
            wait_seconds=time.monotonic() - start,
            tokens=sum(map(len, responses)),
            staleness_steps=rollout.staleness_steps,
        )
        return generated

    def generate_ahead(self, rows: NDArray[np.int64], position: SamplerPosition) -> None:
        """Request the responses of the next step, which is at `position`, before the current one
        trains. `generate` takes them.
        """
        start = time.monotonic()
        self._take_ahead(rows, position.step)
        self.ahead = self._start(
            rows,
            position.step,
            now=position.step - 1,
            in_background=self.config.rollout_backend == "vllm",
        )
        self.stats.wait_seconds += time.monotonic() - start

    def _take_ahead(self, rows: NDArray[np.int64], step: int) -> PendingRollout | None:
        """The responses that were requested for a step; others are dropped."""
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead.answers(rows, step):
            return ahead
        log.warning(
            "the policy did not use the responses that were generated for step %d", ahead.step + 1
        )
        ahead.collect()  # the generator answers one call at a time
        return None

    def _start(
        self, rows: NDArray[np.int64], step: int, *, now: int, in_background: bool
    ) -> PendingRollout:
        """Start this rank's share of the responses of a step.

        now: the step that trains next; its weights generate.
        """
        start = time.monotonic()
        # Give the GPU memory that torch caches to the engine, which wakes up now.
        if self.on_gpu and self.config.rollout_backend == "vllm":
            torch.cuda.empty_cache()
        if not self._sync_weights(now, rows):
            self._check_awake()
        with distributed.raise_on_all_ranks("open the rollout generator"):
            generator = self._open_generator()
        rollout = PendingRollout(
            step, rows, step - self.weights_step, weight_sync_seconds=time.monotonic() - start
        )
        if self._sleep_level == 2:
            self.weights_step = NO_WEIGHTS

        share = shard_rows(len(rows), distributed.rank(), distributed.world_size())
        prompts = [self._prompt_ids(int(rows[place])) for place in share]
        sampling = SamplingParams(
            self.config.temperature,
            self.config.top_p,
            self.config.max_new_tokens,
            seed=self.seed * 1_000_003 + step,
            first_index=share.start,
        )

        def generate_share() -> Responses:
            # In the background only the training shows its progress.
            with Progress(
                len(prompts),
                "responses",
                f"rollout of step {step + 1}",
                silent=in_background,
                min_seconds=LOG_INTERVAL,
            ) as progress:
                responses = generator.generate_ids(prompts, sampling, progress.advance)
            generator.sleep()
            return responses

        rollout.task = start_generation(generate_share, in_background=in_background)
        return rollout

    def snapshot(self, step: int) -> Callable[[Path], list[Path]]:
        """Return a function that saves the generator's weights and the responses of the next step
        into a checkpoint's folder, and returns the files it wrote. It saves no weights if the
        generator gets new ones at `step` anyway.

        All ranks call this method, and wait until the responses are complete. Rank 0 alone calls
        the function, possibly later.
        """
        weights_step, ahead = self.weights_step, self.ahead
        weights = {} if self._sync_due(step) else self.saved_weights
        if ahead is not None:
            ahead.collect()

        def save(folder: Path) -> list[Path]:
            paths = []
            if weights:
                paths.append(folder / WEIGHTS_FILE)
                torch.save({"step": weights_step, "weights": weights}, paths[0])
            if ahead is not None:
                paths.append(ahead.save(folder))
            return paths

        return save

    def restore(self, folder: Path) -> None:
        """Give the generator the weights, and the next step the responses, that they had when the
        checkpoint in `folder` was saved.
        """
        self.ahead = PendingRollout.load(folder)
        if not (folder / WEIGHTS_FILE).is_file():
            return
        with distributed.raise_on_all_ranks("restore the weights of the rollout generator"):
            state = torch.load(folder / WEIGHTS_FILE, map_location="cpu", weights_only=True)
            generator = self._open_generator()
            generator.load_weights(state["weights"].items())
            generator.sleep()
        self.weights_step = int(state["step"])
        self.saved_weights = state["weights"] if distributed.rank() == 0 else {}

    def close(self) -> None:
        """Close the generator, also while it generates."""
        if self.generator is not None:
            self.generator.close()
        if self.ahead is not None:
            self.ahead.wait()

    def _prompt_ids(self, row: int) -> list[int]:
        length = int(self.dataset.prompt_tokens[row])
        return [int(token) for token in self.dataset.tokens(row)[:length]]

    def _sync_weights(self, step: int, rows: NDArray[np.int64]) -> bool:
        """Give the generator the student's weights, unless it has some from the current interval of
        `sync_weights_every` steps. Returns whether it did.
        """
        if not self._sync_due(step):
            return False
        with distributed.raise_on_all_ranks("open the rollout generator"):
            generator = self._open_generator()

        # Gather the weights one after the other; keep a copy for checkpoints if later steps use the
        # same weights.
        weights = self.engine.gathered_parameters(self.module.model)
        if self.student.lora:
            weights = merge_adapters(self.module.model, weights)
        self.saved_weights = {}
        if self.config.sync_weights_every > 1 and distributed.rank() == 0:
            weights = copy_to_host(weights, self.saved_weights)
        with distributed.raise_on_all_ranks("send the student's weights to the rollout generator"):
            send_weights(generator, weights)
        self.weights_step = step
        self._check_weights(int(rows[np.argmax(self.dataset.loss_tokens[rows])]))
        if self.invariance is None:
            self._check_batch_invariance()
        return True

    def _sync_due(self, step: int) -> bool:
        """Whether the generator needs new weights before it generates at a step."""
        interval = self.config.sync_weights_every
        return self.weights_step == NO_WEIGHTS or step // interval != self.weights_step // interval

    def _check_weights(self, row: int) -> None:
        """Compare the generator's log-probability of a row's response with the student's. Raises
        ResourceError on all ranks if they differ by more than rounding.
        """
        (student,) = student_log_probs(self.engine, self.dataset, [row])
        tokens = [int(token) for token in self.dataset.tokens(row)]
        start = max(1, int(self.dataset.prompt_tokens[row]))
        with distributed.raise_on_all_ranks("compare the rollout generator with the student"):
            generator_nats, tolerance = self._generator_nats(tokens, start)
            student_nats = -float(student[0])
            self.checked = tokens, start, generator_nats
            if not abs(generator_nats - student_nats) <= tolerance:  # also true for a NaN
                raise ResourceError(
                    f"the cross-entropy of a response is {generator_nats:.4f} nats in the rollout "
                    f"generator ({self.config.rollout_backend}) and {student_nats:.4f} in the "
                    "student: the generator did not load the new weights; set "
                    "policy.rollout_backend=transformers"
                )

    def _check_awake(self) -> None:
        """After sleep level 1, compare the generator's log-probability of a response with that from
        before it slept, which was compared with the student's. Raises ResourceError on all ranks.
        """
        if self._sleep_level != 1 or self.checked is None:
            return
        tokens, start, nats_before = self.checked
        with distributed.raise_on_all_ranks("check that the rollout generator kept its weights"):
            nats, tolerance = self._generator_nats(tokens, start)
            if not abs(nats - nats_before) <= tolerance:
                raise ResourceError(
                    f"the cross-entropy of a response was {nats_before:.4f} nats in the rollout "
                    f"generator before it slept, and is {nats:.4f} after it woke up: it lost its "
                    "weights; set policy.sync_weights_every=1 or "
                    "policy.rollout_backend=transformers"
                )

    def _generator_nats(self, tokens: list[int], start: int) -> tuple[float, float]:
        """The cross-entropy of the tokens from `start` on in the generator, in nats, and how far
        rounding may move it.
        """
        (log_probs,) = self._open_generator().log_probs([tokens], [start])
        tolerances = GPU_TOLERANCE if self.on_gpu else TOLERANCE
        per_token, per_response = tolerances[resolve_dtype(self.student.dtype)]
        tolerance = per_token * max(1, len(tokens) - start) + per_response
        return -float(np.sum(log_probs, dtype=np.float64)), tolerance

    def _check_batch_invariance(self) -> None:
        """Check before the first rollout, on a few samples, that the generator's log-probabilities
        do not depend on the batch and are those of the student. Raises ModelError on all ranks.
        """
        rows = choose_rows(self.dataset, self._generation_config(), seed=self.seed)
        student = [student_log_probs(self.engine, self.dataset, [row])[0] for row in rows]
        backend = self.config.rollout_backend
        other = "transformers" if backend == "vllm" else "vllm"
        with distributed.raise_on_all_ranks("check the rollout generator"):
            self.invariance = check_generator(
                f"rollouts: the student in {backend}",
                self._open_generator(),
                self.dataset,
                rows,
                dtype=resolve_dtype(self.student.dtype),
                remedy=f"set policy.max_num_seqs=1 or policy.rollout_backend={other}",
                reference=("the trainer", lambda places: [student[place] for place in places]),
            )

    @property
    def _sleep_level(self) -> int:
        """See `VllmGenerator`. The engine may drop its weights if it gets new ones before every
        rollout. It does not sleep if it generates while a step trains.
        """
        if self.config.rollout_backend != "vllm" or not self.on_gpu or self.config.staleness:
            return 0
        return 2 if self.config.sync_weights_every == 1 else 1

    def _open_generator(self) -> Generator:
        """The generator, opened at the first call."""
        if self.generator is None:
            generator = self.generator = self._make_generator(self._generation_config())
            log.info(
                "%s generates the student's responses, and gets its weights every %d steps%s",
                self.config.rollout_backend,
                self.config.sync_weights_every,
                describe_idle_time(self.config, generator, on_gpu=self.on_gpu),
            )
        return self.generator

    def _generation_config(self) -> GenerationConfig:
        return GenerationConfig(
            backend="vllm" if self.config.rollout_backend == "vllm" else "transformers",
            max_num_seqs=self.config.max_num_seqs,
            gpu_memory_utilization=self.config.gpu_memory_utilization,
            dtype=self.student.dtype,
        )

    def _make_generator(self, settings: GenerationConfig) -> Generator:
        return make_generator(
            self.config,
            settings,
            self.student,
            self.model_path,
            max_length=self.generator_length,
            end_of_turn_ids=self.end_of_turn_ids,
            sleep_level=self._sleep_level,
            on_gpu=self.on_gpu,
        )
