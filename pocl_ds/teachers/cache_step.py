"""The step cache-teacher: the teacher reads each sample once, and its outputs are stored for all
stages and epochs: hidden states, or records of its largest or of sampled probabilities
(docs/method.md, eq. 19 and 32).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocl_ds.config import StudentConfig, TeacherCacheConfig, TeacherConfig
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.errors import RecipeError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.models.dtypes import resolve_dtype
from pocl_ds.models.load import load_model_config, resolve_model
from pocl_ds.models.quantization import check_quantized_teacher
from pocl_ds.models.recipe_model import ModelLoader, load_recipe_model
from pocl_ds.models.vocab import VocabMap, align_model_vocabularies
from pocl_ds.runtime import distributed
from pocl_ds.teachers.cache import STEP, CacheShard
from pocl_ds.teachers.cache_writer import CacheWriter
from pocl_ds.teachers.codecs import build_codec
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.workflow.manifest import read_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

SPLITS = ("train", "validation")


def cache_teacher(
    run: RunDirectory,
    *,
    teacher: TeacherConfig,
    student: StudentConfig,
    config: TeacherCacheConfig,
    usage: TeacherUsage,
    seed: int,
    fingerprint: str,
    shard: int | None = None,
    load: ModelLoader = load_recipe_model,
) -> None:
    """Write teacher_cache/: the teacher's outputs at the loss tokens of the training and validation
    samples, and its head. Finished shards are not written again.

    All ranks call it together; each computes its share of a shard. shard: write only this shard of
    each split. seed: of random records. load: reads the weights of the teacher. With
    teacher.mode=auto the ranks first measure whether a cache saves time. Raises RecipeError for a
    shard that does not exist or a `top_k` that is too large, ResourceError for a full disk.
    """
    # Return if the step is finished, and check the settings.
    manifest = read_manifest(run.teacher_cache)
    if manifest and manifest.fingerprint == fingerprint:
        return
    _check_shard(shard, config.shards)
    if distributed.world_size() > 1:
        start_deepspeed()
    path, student_path = resolve_model(teacher), resolve_model(student)
    check_quantized_teacher(teacher, _model_config(path, teacher))

    # Divide the splits into shards, whose sizes follow from the tokenized data alone.
    splits = [TokenizedSplit.open(run.data, name) for name in SPLITS]
    vocab = VocabMap.from_alignment(align_model_vocabularies(teacher, path, student, student_path))
    codec = build_codec(teacher.mode, config, vocab.size, usage.temperatures)
    if codec:
        codec.validate(int(vocab.allowed.sum()))
    shards = _plan_shards(run, splits, config.shards, _token_layout(path, teacher, codec))
    unfinished = distributed.broadcast_object(
        [
            cache_shard
            for cache_shard in shards
            if shard in (None, cache_shard.number)
            and cache_shard.finished_manifest(fingerprint) is None
        ]
    )

    # Write the unfinished shards, and the step's manifest once all shards are finished.
    info: dict[str, Any] = {"mode": "cached_hidden_states"}
    if codec:
        info = {"mode": codec.mode, "codec": vars(codec)}
    if unfinished:
        writer = CacheWriter(run, teacher, path, vocab, codec, config, seed, load)
        info |= writer.write(splits, shards, unfinished, usage, fingerprint)
    distributed.barrier()
    if distributed.rank() == 0:
        required = [] if info["mode"] == "online" else shards
        if all(cache_shard.finished_manifest(fingerprint) for cache_shard in required):
            _finish_cache(run, required, codec, info, fingerprint)
    distributed.barrier()


def _check_shard(shard: int | None, count: int) -> None:
    if shard is not None and not 0 <= shard < count:
        raise RecipeError(
            f"shard {shard} does not exist: teacher_cache.shards={count}, choose 0 to {count - 1}"
        )


def _model_config(path: str, teacher: TeacherConfig) -> Any:
    return load_model_config(
        path, trust_remote_code=teacher.trust_remote_code, revision=teacher.revision
    )


def _token_layout(path: str, teacher: TeacherConfig, codec: RecordCodec | None) -> tuple[int, str]:
    """Width and dtype of one token's outputs."""
    if codec:
        return codec.bytes, "uint8"
    # The width of the head's input; OPT projects before its head.
    config = _model_config(path, teacher)
    width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    return int(width), resolve_dtype(teacher.dtype)


def _plan_shards(
    run: RunDirectory, splits: Sequence[TokenizedSplit], count: int, layout: tuple[int, str]
) -> list[CacheShard]:
    """All shards of all splits."""
    run.teacher_cache.mkdir(parents=True, exist_ok=True)
    return [
        CacheShard.for_split(run.teacher_cache, split, number, count, *layout)
        for split in splits
        for number in range(count)
    ]


def _finish_cache(
    run: RunDirectory,
    shards: list[CacheShard],
    codec: RecordCodec | None,
    info: dict[str, Any],
    fingerprint: str,
) -> None:
    """Write the step's manifest, and remove shards of another division. info: its `mode`; the sizes
    and the error of records are added.
    """
    # Remove the shards of another division.
    current = {
        path.name
        for shard in shards
        for path in (shard.path, shard.checksum_path, run.teacher_cache / shard.manifest_name)
    }
    for path in run.teacher_cache.glob("*-of-*"):
        if path.name not in current:
            path.unlink()

    # Sum the sizes.
    if shards:
        tokens = int(sum(shard.offsets[-1] for shard in shards))
        info |= {
            "shards": shards[-1].count,
            "width": shards[0].width,
            "dtype": shards[0].dtype,
            "tokens": tokens,
            "bytes": sum(shard.bytes for shard in shards),
        }
        log.info(
            "%s: %.3f GB, %d bytes for each of %d tokens",
            STEP,
            info["bytes"] / 1e9,
            info["bytes"] // max(tokens, 1),
            tokens,
        )
    if codec:
        info["error"] = _mean_error(shards, codec, info["tokens"], fingerprint)
    write_manifest(
        run.teacher_cache,
        STEP,
        fingerprint,
        info=info,
        files=sorted((run.teacher_cache / "head").glob("*")),
    )


def _mean_error(
    shards: list[CacheShard], codec: RecordCodec, tokens: int, fingerprint: str
) -> list[dict[str, float]]:
    """What the records lose per token, at each temperature (see `RecordCodec.error_sums`)."""
    manifests = [shard.finished_manifest(fingerprint) for shard in shards]
    sums = np.sum([manifest.info["error"] for manifest in manifests if manifest], axis=0)
    errors = []
    for temperature, means in zip(
        codec.temperatures, (sums / max(tokens, 1)).tolist(), strict=True
    ):
        values, sentence = codec.describe_error(means)
        errors.append({"temperature": temperature, **values})
        log.info("%s: at temperature %.2f %s", STEP, temperature, sentence)
    return errors
