"""The difficulty rankings of stages by the student that enters them (`curriculum.rescoring`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_ds.curriculum.stage_files import load_weights, stage_directory
from pocl_ds.runtime.formatting import format_duration
from pocl_ds.workflow.manifest import Manifest, read_manifest
from pocl_ds.workflow.run_dir import RunDirectory

RANKING_NOTE = (
    "When a stage began, the current student scored samples and ranked all of them again. The rank "
    "correlation is with the order before; weights are those of the rule, of samples that take "
    "part."
)


@dataclass(frozen=True)
class StageRankingRecord:
    """What the ranking of a stage recorded."""

    stage: int  # from 0
    difficulty: str
    samples: int  # that were scored
    seconds: float
    rank_correlation: float  # with the order before
    left_out: int  # samples of weight 0
    weights: tuple[float, float] | None  # the smallest and the largest of the others; None: all 1


def read_stage_rankings(
    run: RunDirectory, stages: int, trained: Manifest | None
) -> list[StageRankingRecord]:
    """The finished rankings of the stages of `train`.

    trained: the manifest of `train`, None if it is not finished; rankings of another training are
    left out. Raises ArtifactError for damaged weights.
    """
    records = []
    for stage in range(stages):
        directory = stage_directory(run.train, stage)
        manifest = read_manifest(directory)
        if manifest is None or (trained and manifest.fingerprint != trained.fingerprint):
            continue
        info = manifest.info
        weights = load_weights(directory, f"remove {run.train} and train again")
        positive = None if weights is None else weights[weights > 0]
        records.append(
            StageRankingRecord(
                stage,
                info["difficulty"],
                info["samples"],
                info["seconds"],
                info["rank_correlation"],
                info["left_out"],
                None if positive is None else (float(positive.min()), float(positive.max())),
            )
        )
    return records


def ranking_rows(
    rankings: Sequence[StageRankingRecord],
) -> tuple[list[str], list[list[str]]]:
    """Header, and one row per ranked stage."""
    header = ["stage", "ranked by", "samples scored", "time", "rank correlation"]
    header += ["samples left out", "weights"]
    rows = []
    for ranking in rankings:
        low, high = ranking.weights or (1.0, 1.0)
        rows.append(
            [
                str(ranking.stage + 1),
                ranking.difficulty,
                f"{ranking.samples:,}",
                format_duration(ranking.seconds),
                f"{ranking.rank_correlation:.3f}",
                f"{ranking.left_out:,}",
                f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}",
            ]
        )
    return header, rows
