"""Which codec the records of a teacher cache have, from the recipe or from the cache's manifest."""

from __future__ import annotations

from typing import Any

from pocl_ds.config import TeacherCacheConfig
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.losses.sampled_logits import SampledCodec
from pocl_ds.losses.top_k import TopKCodec

CODECS: dict[str, type[TopKCodec] | type[SampledCodec]] = {
    codec.mode: codec for codec in (TopKCodec, SampledCodec)
}


def build_codec(
    mode: str, config: TeacherCacheConfig, size: int, temperatures: tuple[float, ...]
) -> RecordCodec | None:
    """The codec of a `teacher.mode`; None for one that stores no records. size: ids that take
    part.
    """
    if mode == TopKCodec.mode:
        return TopKCodec(config.top_k, size, temperatures, config.top_p)
    if mode == SampledCodec.mode:
        return SampledCodec(config.num_samples, size, temperatures)
    return None


def read_codec(mode: str, fields: dict[str, Any]) -> RecordCodec:
    """The codec with the fields that a manifest has."""
    return CODECS[mode](**{**fields, "temperatures": tuple(fields["temperatures"])})
