"""The step cache-teacher: a teacher reads each of its samples once, and its outputs are stored for
all stages and epochs: hidden states, or records of its largest or of sampled probabilities
(docs/method.md, eq. 19 and 32).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocl_ds.config import StudentConfig, TeacherCacheConfig, TeacherConfig
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.engines.deepspeed_engine import start_deepspeed
from pocl_ds.errors import RecipeError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.losses.top_k import TopKCodec
from pocl_ds.models.load import resolve_model
from pocl_ds.models.quantization import check_quantized_teacher
from pocl_ds.models.recipe_model import ModelLoader, load_recipe_model, read_model_config
from pocl_ds.models.vocab import VocabMap, align_teacher_vocabularies
from pocl_ds.runtime import distributed
from pocl_ds.runtime.formatting import format_size
from pocl_ds.teachers.cache_plan import PlannedCache, plan_caches, prepare_caches
from pocl_ds.teachers.cache_shard import STEP, CacheShard
from pocl_ds.teachers.cache_writer import check_size, fill_cache
from pocl_ds.teachers.codecs import build_codec
from pocl_ds.teachers.mode_selection import TeacherUsage
from pocl_ds.teachers.quantized_states import SCALE_BYTES
from pocl_ds.teachers.served_teacher import fill_from_endpoint
from pocl_ds.teachers.state_sources import SourceFactory
from pocl_ds.workflow.files import MARK
from pocl_ds.workflow.manifest import MANIFEST, finished_manifest, write_manifest
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class CacheLayout:
    """What the step writes: the caches of all teachers, and the shards of each. codec: None for
    hidden states.
    """

    splits: list[TokenizedSplit]
    vocab: VocabMap
    codec: RecordCodec | None
    caches: list[PlannedCache]
    shards: list[list[CacheShard]]

    @property
    def mode(self) -> str:
        """The value of teacher.mode of what is stored."""
        return self.codec.mode if self.codec else "cached_hidden_states"


def plan_cache(
    run: RunDirectory,
    *,
    teacher: TeacherConfig,
    student: StudentConfig,
    config: TeacherCacheConfig,
    usage: TeacherUsage,
    model_fingerprints: Mapping[str, str],
) -> CacheLayout:
    """Choose the samples of each teacher, and divide them into shards, whose sizes follow from the
    tokenized data alone. Arguments as of `cache_teacher`.
    """
    sources, student_path = teacher.sources, resolve_model(student)
    paths = [resolve_model(source) for source in sources]
    for source, path in zip(sources, paths, strict=True):
        check_quantized_teacher(teacher, read_model_config(path, source))
    splits = [TokenizedSplit.open(run.data, name) for name in SPLITS]
    vocab = VocabMap.from_alignment(
        align_teacher_vocabularies(list(zip(sources, paths, strict=True)), student, student_path)
    )
    codec = build_codec(teacher.mode, config, vocab.size, usage.temperatures)
    if codec:
        codec.validate(int(vocab.allowed.sum()))
    caches = plan_caches(run, teacher, paths, splits, usage, model_fingerprints)
    shards = [plan_shards(cache, splits, config, codec) for cache in caches]
    return CacheLayout(splits, vocab, codec, caches, shards)


def cache_teacher(
    run: RunDirectory,
    *,
    teacher: TeacherConfig,
    student: StudentConfig,
    config: TeacherCacheConfig,
    usage: TeacherUsage,
    seed: int,
    fingerprint: str,
    model_fingerprints: Mapping[str, str],
    shard: int | None = None,
    load: ModelLoader = load_recipe_model,
) -> None:
    """Write teacher_cache/: for each teacher its outputs at the loss tokens of its training and
    validation samples, and its head. One teacher is in memory at a time. Finished shards are not
    written again.

    All ranks call it together; each computes its share of a shard. shard: write only this shard of
    each split of each teacher. seed: of random records. model_fingerprints: of each teacher without
    its samples, by its field. load: reads the weights of a teacher. With teacher.mode=auto the
    ranks first measure whether a cache saves time. Raises RecipeError for a shard that does not
    exist or a `top_k` that is too large, ResourceError for a full disk.
    """
    # Return if the step is finished.
    if finished_manifest(run.teacher_cache, fingerprint):
        return
    _check_shard(shard, config.shards)
    if distributed.world_size() > 1:
        start_deepspeed()
    layout = plan_cache(
        run,
        teacher=teacher,
        student=student,
        config=config,
        usage=usage,
        model_fingerprints=model_fingerprints,
    )
    splits, codec, caches, shards = layout.splits, layout.codec, layout.caches, layout.shards
    with distributed.raise_on_all_ranks("prepare the teacher cache"):
        if distributed.rank() == 0:
            prepare_caches(run, caches)
    distributed.barrier()

    # Write the unfinished shards, one teacher at a time, and then the manifests.
    longest = max(int(split.total_tokens.max(initial=1)) for split in splits)
    infos: list[dict[str, Any]] = []
    for cache, own in zip(caches, shards, strict=True):
        infos.append({"mode": layout.mode, "backend": config.backend, **codec_info(cache, codec)})
        unfinished = _unfinished_shards(cache, own, shard)
        if unfinished and cache.teacher.endpoint:
            assert isinstance(codec, TopKCodec)
            check_size(own, config.max_disk_gb)
            infos[-1] |= fill_from_endpoint(
                cache.teacher, codec, layout.vocab, splits, unfinished, cache.fingerprint
            )
        elif unfinished:
            infos[-1] |= fill_cache(
                cache.directory,
                SourceFactory(cache.teacher, cache.model.path, layout.vocab, config, longest, load),
                codec,
                splits,
                list(itertools.chain(*shards)),
                unfinished,
                usage=usage,
                seed=seed,
                fingerprint=cache.fingerprint,
            )
    distributed.barrier()
    if distributed.rank() == 0:
        if infos[0]["mode"] == "online":
            write_manifest(run.teacher_cache, STEP, fingerprint, info=infos[0], files=[])
        else:
            for cache, own, info in zip(caches, shards, infos, strict=True):
                finish_cache(cache, own, codec, info)
            finish_step(run, caches, layout.mode, fingerprint)
    distributed.barrier()


def codec_info(cache: PlannedCache, codec: RecordCodec | None) -> dict[str, Any]:
    """What readers must know of the stored outputs besides width and dtype."""
    return {"codec": vars(codec)} if codec else {"state_dtype": cache.state_dtype}


def _unfinished_shards(
    cache: PlannedCache, shards: list[CacheShard], number: int | None
) -> list[CacheShard]:
    """The shards that are missing, on all ranks those of rank 0. number: of the requested one."""
    unfinished: list[CacheShard] = distributed.broadcast_object(
        [
            shard
            for shard in shards
            if number in (None, shard.number)
            and not cache.is_finished
            and shard.finished_manifest(cache.fingerprint) is None
        ]
    )
    return unfinished


def _check_shard(shard: int | None, count: int) -> None:
    if shard is not None and not 0 <= shard < count:
        raise RecipeError(
            f"shard {shard} does not exist: teacher_cache.shards={count}, choose 0 to {count - 1}"
        )


def plan_shards(
    cache: PlannedCache,
    splits: Sequence[TokenizedSplit],
    config: TeacherCacheConfig,
    codec: RecordCodec | None,
) -> list[CacheShard]:
    """All shards of a teacher."""
    width, dtype = (codec.bytes, "uint8") if codec else _state_layout(cache, config.hidden_dtype)
    return [
        CacheShard.for_split(
            cache.directory,
            split,
            cache.rows[split.name],
            number,
            config.shards,
            width,
            dtype,
            codec,
        )
        for split in splits
        for number in range(config.shards)
    ]


def _state_layout(cache: PlannedCache, hidden_dtype: str) -> tuple[int, str]:
    """Width and dtype of one token's hidden state on disk."""
    # The width of the head's input; OPT projects before its head.
    config = read_model_config(cache.model.path, cache.teacher)
    width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    if hidden_dtype == "int8":
        return int(width) + SCALE_BYTES, "uint8"
    return int(width), cache.state_dtype if hidden_dtype == "model" else hidden_dtype


def finish_cache(
    cache: PlannedCache, shards: list[CacheShard], codec: RecordCodec | None, info: dict[str, Any]
) -> None:
    """Write the manifest of a teacher's cache if its shards are finished, and remove shards of
    another division. info: its `mode`, and the `error` of outputs that were imported; the sizes
    are added, and the error of records that were made here.
    """
    if cache.is_finished or not all(shard.finished_manifest(cache.fingerprint) for shard in shards):
        return
    # Remove the shards of another division.
    current = {
        path.name
        for shard in shards
        for path in (
            shard.path,
            shard.checksum_path,
            shard.lengths_path,
            cache.directory / shard.manifest_name,
        )
    }
    for path in cache.directory.glob("*-of-*"):
        if path.name not in current:
            path.unlink()

    # Sum the sizes.
    tokens = int(sum(shard.offsets[-1] for shard in shards))
    info |= {
        "shards": shards[-1].count,
        "width": shards[0].width,
        "dtype": shards[0].dtype,
        "tokens": tokens,
        "bytes": sum(shard.path.stat().st_size for shard in shards),
    }
    log.info(
        "%s: %s: %s, %d bytes for each of %d tokens",
        STEP,
        cache.model.label,
        format_size(info["bytes"]),
        info["bytes"] // max(tokens, 1),
        tokens,
    )
    if codec and "error" not in info:
        info["error"] = _mean_error(shards, codec, tokens, cache.fingerprint)
    files = [*cache.directory.glob("*.npy"), *(cache.directory / "head").glob("*")]
    # A shard has its own manifest, and a mark no content.
    files = [path for path in files if "-of-" not in path.name and path.name != MARK]
    write_manifest(cache.directory, STEP, cache.fingerprint, info=info, files=sorted(files))


def finish_step(
    run: RunDirectory, caches: Sequence[PlannedCache], mode: str, fingerprint: str
) -> None:
    """Write the step's manifest, which names the folder of each teacher, if all are finished."""
    teachers = []
    for cache in caches:
        manifest = cache.manifest
        if manifest is None:
            return
        teachers.append(
            {
                "model": cache.model.label,
                "fields": cache.model.fields,
                "folder": cache.directory.name,
                "fingerprint": cache.fingerprint,
                "samples": {split: len(rows) for split, rows in cache.rows.items()},
                **{name: manifest.info[name] for name in ("tokens", "bytes")},
            }
        )
    totals = {name: sum(entry[name] for entry in teachers) for name in ("tokens", "bytes")}
    write_manifest(
        run.teacher_cache,
        STEP,
        fingerprint,
        info={"mode": mode, **totals, "teachers": teachers},
        files=[cache.directory / MANIFEST for cache in caches],
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
