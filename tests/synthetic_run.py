"""A run directory written by hand, in the layout of the workflow steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pocl_ds.curriculum.stage_files import stage_directory
from pocl_ds.data.conversation import Sample
from pocl_ds.workflow.files import write_json
from pocl_ds.workflow.manifest import write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

STEPS = 180
ATTACK = "<script>alert('x')</script> | one\ntwo ![i](http://example.org/i.png) \u0007"
TEXTS = {
    "initial": "the the the the of of a a",
    "student": "Return the indices that would sort an array along the given axis.",
    "teacher": "Returns the indices that would sort an array.",
}


class SyntheticRun:
    """Writes the results of each step separately, so that a test can leave some out."""

    def __init__(self, path: Path) -> None:
        self.run = RunDirectory(path)
        self.recipe = "name: synthetic\nseed: 3\nloss:\n  name: fkl\ntrain:\n  length_window: 1\n"

    def everything(self) -> RunDirectory:
        """Write the results of all steps."""
        self.data()
        self.plan()
        self.train()
        self.ranking()
        self.evaluation()
        return self.run

    def data(self, samples: int = 400, texts: Sequence[str] = ()) -> None:
        """Write data and scores. texts: parts of prompts, references and responses, in turn."""
        self.run.data.mkdir(parents=True)
        self.run.scores.mkdir(parents=True)
        samples_file, shard = (
            self.run.data / "train.jsonl",
            self.run.scores / "shard-00000-of-00001.jsonl",
        )
        with samples_file.open("w") as data, shard.open("w") as scores:
            for i in range(samples):
                text = texts[i % len(texts)] if texts else ""
                sample = Sample.from_instruction(
                    f"s{i}",
                    f"Say what sample {i} is about. {text}",
                    f"It is about {i}. {text}",
                    input=text,
                )
                data.write(json.dumps(json.loads(sample.to_json())) + "\n")  # ASCII
                scored = {
                    "id": f"s{i}",
                    "rouge_l": 0.1,
                    "cross_entropy": 2.0,
                    "response": f"the {i} {text}",
                }
                scores.write(json.dumps(scored) + "\n")
        write_manifest(
            self.run.scores,
            "score",
            "s" * 64,
            info={"seconds": 30.5},
            files=[],
            name=f"{shard.name}.manifest.json",
        )
        (self.run.data / "test.jsonl").write_text("{}\n")
        write_manifest(
            self.run.data,
            "preprocess",
            "d" * 64,
            info={"seconds": 4.2, "splits": {"train": {"samples": 400}}},
        )

    def plan(self, samples: int = 400) -> None:
        stages = [
            {
                "index": i,
                "start": 0,
                "stop": (i + 1) * samples // 4,
                "temperature": 1 + i / 3,
                "sft_ratio": 0.3 - i / 10,
                "epochs": 1,
                "steps_per_epoch": 18 * (i + 1),
                "steps": 18 * (i + 1),
            }
            for i in range(4)
        ]
        tree = {
            "batch_size": 8,
            "total_steps": 180,
            "scheduler": "baby_step",
            "drop_last": True,
            "stages": stages,
            "subset_ends": [stage["stop"] for stage in stages],
        }
        write_json(self.run.plan / "plan.json", tree)
        write_manifest(self.run.plan, "plan", "p" * 64)

    def train(self, steps: int = STEPS, *, finished: bool = True) -> None:
        noise = np.random.default_rng(0).normal(0, 0.12, (steps, 2))
        self.run.train.mkdir(parents=True, exist_ok=True)
        with (self.run.train / "metrics.jsonl").open("w") as stream:
            for step in range(1, steps + 1):
                stage = min(3, int(math.sqrt(step / steps * 16.0)))
                temperature, sft_ratio = 1 + stage / 3, 0.3 - stage / 10
                kd_loss, sft_loss = (
                    (4 * math.exp(-step / steps * 3) + 0.8 + noise[step - 1, 0]),
                    4.3 + noise[step - 1, 1],
                )
                record = {
                    "kind": "step",
                    "step": step,
                    "stage": stage,
                    "epoch": 0,
                    "loss": sft_ratio * sft_loss + (1 - sft_ratio) * kd_loss,
                    "kd_loss": kd_loss,
                    "sft_loss": sft_loss,
                    "temperature": temperature,
                    "sft_ratio": sft_ratio,
                    "lr": 3e-4 * 0.5 * (1 + math.cos(math.pi * step / steps)),
                    "grad_norm": 1.0,
                    "loss_tokens": 200,
                    "tokens_per_second": 410 + 30 * noise[step - 1, 0],
                    "tokens_per_second_per_rank": 205.0,
                    "seconds": 1.0,
                    "data_seconds": 0.02,
                    "teacher_seconds": 0.3,
                    "student_seconds": 0.5,
                    "optimizer_seconds": 0.1,
                    "wait_seconds": 0.08,
                    "mfu": 0.41,
                    "load_imbalance": 1.08,
                    "sample_ids_digest": "0" * 16,
                }
                stream.write(json.dumps(record) + "\n")
                if step % (steps // 4) == 0:
                    record = {
                        "kind": "validation",
                        "step": step,
                        "stage": stage,
                        "validation_kd_loss": 1.0 - step / steps / 4,
                        "validation_loss": 4.9 - step / steps,
                    }
                    stream.write(json.dumps(record) + "\n")
            stream.write('{"kind": "step", "ste')  # an incomplete line
        if finished:
            info = {
                "seconds": 211.0,
                "ranks": 2,
                "steps": steps,
                "packed": True,
                "padding_share": 0.314,
            }
            write_manifest(self.run.train, "train", "t" * 64, info=info)

    def stage_ranking(
        self,
        stage: int,
        order: NDArray[np.int64],
        weights: NDArray[np.float32] | None = None,
        *,
        fingerprint: str = "t" * 64,
    ) -> None:
        """Write the ranking of a stage, counted from 0, by the student that enters it."""
        folder = stage_directory(self.run.train, stage)
        folder.mkdir(parents=True)
        np.save(folder / "order.npy", order)
        if weights is not None:
            np.save(folder / "weights.npy", weights)
        info = {
            "kind": "stage_ranking",
            "step": 18,
            "stage": stage,
            "difficulty": "loss_ratio",
            "samples": 1234,
            "left_out": 0 if weights is None else int((weights == 0).sum()),
            "rank_correlation": 0.8125,
            "seconds": 75.0,
        }
        write_manifest(folder, "stage-ranking", fingerprint, info=info)

    def ranking(self, samples: int = 400) -> None:
        generator = np.random.default_rng(1)
        entropy = np.sort(generator.gamma(8, 0.5, samples)) + generator.normal(0, 0.25, samples)
        rouge = np.clip(0.4 - 0.05 * entropy + generator.normal(0, 0.08, samples), 0, 1)
        ids = [f"s{i}" for i in range(samples)]
        self.run.ranking.mkdir(parents=True)
        np.save(self.run.ranking / "order.npy", np.arange(samples))
        pq.write_table(
            pa.table({"id": ids, "rouge_l": rouge, "cross_entropy": entropy}),
            self.run.ranking / "ranking.parquet",
        )
        write_manifest(self.run.ranking, "rank", "r" * 64, info={"samples": samples})

    def evaluation(
        self,
        texts: dict[str, str] | None = None,
        *,
        items: int = 30,
        benchmarks: Sequence[str] = ("test",),
        extra: str = "",
    ) -> None:
        texts = texts or TEXTS
        results: dict[str, Any] = {"seeds": [10, 20], "models": {}}
        for model, text in texts.items():
            rouge = {"initial": 2.1, "student": 14.2, "teacher": 17.8}[model]
            loss = {"initial": 5.41, "student": 4.25, "teacher": 3.98}[model]
            for name in benchmarks:
                for seed in (10, 20):
                    self._answers(model, name, seed, text, items, rouge / 100, extra)
            results["models"][model] = {
                "loss": loss,
                "kl": 0.0 if model == "teacher" else loss - 3.45,
                "tokens": 900.0,
                "benchmarks": {
                    name: {
                        "samples": items,
                        "rouge_l": rouge,
                        "rouge_l_deviation": 0.42,
                        "rouge_l_by_seed": [rouge],
                        "exact_match": 0.0,
                        "words": 9.0,
                        "repetition_rate": 0.1,
                        "distinct_1": 0.25,
                        "distinct_2": 0.755,
                        "loss": 4.321,
                        "kl": 0.765,
                    }
                    for name in benchmarks
                },
            }
        write_json(self.run.evaluation / "results.json", results)
        write_manifest(
            self.run.evaluation,
            "evaluate",
            "e" * 64,
            files=[self.run.evaluation / "results.json"],
            info={"seconds": 64.0},
        )

    def _answers(
        self, model: str, benchmark: str, seed: int, text: str, items: int, rouge: float, extra: str
    ) -> None:
        folder = self.run.evaluation / model
        folder.mkdir(parents=True, exist_ok=True)
        spread = np.random.default_rng([ord(model[0]), seed]).normal(0, 0.05, items)
        spread -= spread.mean()
        with (folder / f"{benchmark}-seed{seed}.jsonl").open("w") as stream:
            for i in range(items):
                stream.write(
                    json.dumps(
                        {
                            "id": f"q{i}",
                            "prompt": f"### Instruction:\nQ{i} {extra}",
                            "instruction": f"Explain what `numpy.argsort` does ({i}). {extra}",
                            "response": text,
                            "references": ["Returns the indices that would sort an array."],
                            "rouge_l": float(rouge + spread[i]),
                        }
                    )
                    + "\n"
                )
