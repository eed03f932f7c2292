"""`teacher.endpoint`: what a served teacher cannot give is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pocl_ds.config import Recipe

SERVED: dict[str, Any] = {"urls": "http://a:1/v1, http://b:2/v1"}


def recipe(teacher: dict[str, Any], **sections: Any) -> Recipe:
    endpoint = {**SERVED, **teacher.pop("endpoint", {})}
    return Recipe.model_validate(
        {
            "name": "r",
            "data": {"source": "documentation"},
            "student": {"model": "s"},
            "curriculum": {"temperature": [1, 1]},
            "teacher": {"model": "t", "endpoint": endpoint, **teacher},
            **sections,
        }
    )


def test_served_teachers_that_are_possible() -> None:
    top_k = recipe({"mode": "cached_topk"})
    assert top_k.teacher and top_k.teacher.endpoint and top_k.local_teacher is top_k.teacher
    assert top_k.teacher.endpoint.urls == ("http://a:1/v1", "http://b:2/v1")
    seqkd: dict[str, Any] = {"loss": {"name": "sft"}, "policy": {"name": "seqkd"}}
    assert recipe({}, **seqkd).local_teacher is not None
    texts = recipe({"endpoint": {"api": "chat"}}, **seqkd, curriculum={"temperature": [1, 2]})
    assert texts.local_teacher is None and texts.teacher is not None


@pytest.mark.parametrize(
    ("teacher", "sections", "message"),
    [
        ({}, {}, "teacher.mode=online needs more: set teacher.mode=cached_topk"),
        ({"mode": "auto"}, {}, "teacher.mode=auto needs more"),
        ({"mode": "cached_hidden_states"}, {}, "cached_hidden_states needs more"),
        ({"mode": "cached_sampled"}, {}, "cached_sampled needs more"),
        (
            {"mode": "cached_topk"},
            {"curriculum": {"temperature": [1, 2]}},
            r"recipe has curriculum.temperature=\[1.0, 2.0\]: set curriculum.temperature=\[1, 1\]",
        ),
        (
            {"mode": "cached_topk"},
            {"baseline": {"enabled": True, "temperature": 2}},
            "and baseline.temperature=2: set .* and baseline.temperature=1",
        ),
        (
            {},
            {"policy": {"name": "gkd"}, "curriculum": {"sft_ratio": [0, 0]}},
            "policy.name=gkd needs the teacher's outputs on new responses",
        ),
        (
            {},
            {"policy": {"name": "mixture", "shares": {"data": 0.5, "teacher": 0.5}}},
            "policy.name=mixture needs the teacher's outputs on new responses",
        ),
        ({}, {"loss": {"name": "uld"}}, "loss.name=uld needs the teacher's outputs in its own"),
        ({}, {"loss": {"fused": False}}, "loss.fused=false needs the teacher's complete logits"),
        ({"endpoint": {"api": "chat"}}, {}, "api=chat exchanges texts, .* policy.name is off"),
        ({"ensemble": [{"model": "u"}]}, {}, "runs one teacher, and teacher.ensemble names more"),
        ({"by_stage": {2: {"model": "u"}}}, {}, "and teacher.by_stage names more"),
        (
            {"quantization": "bnb_8bit", "ds_config": None},
            {},
            "teacher.quantization=bnb_8bit has no effect",
        ),
        ({}, {"teacher_cache": {"backend": "vllm"}}, "teacher_cache.backend=vllm runs the teacher"),
        ({}, {"student": {"model": "s", "heal_steps": 300}}, "heal_steps=300 needs the teacher"),
        ({"endpoint": {"urls": "http://a:1/v1,http://a:1/v1/"}}, {}, "http://a:1/v1 appears twice"),
        ({"endpoint": {"urls": []}}, {}, "at least 1 item"),
        ({"endpoint": {"urls": "http://user:word@a/v1"}}, {}, "urls"),
        ({"endpoint": {"urls": "http:///v1"}}, {}, "its host or its port is not valid"),
        ({"endpoint": {"urls": "http://a:port/v1"}}, {}, "its host or its port is not valid"),
        ({"endpoint": {"urls": "http://a:65536/v1"}}, {}, "its host or its port is not valid"),
        ({"endpoint": {"urls": "http://[::1/v1"}}, {}, "its host or its port is not valid"),
        ({"endpoint": {"api_key_env": "sk-123"}}, {}, "not the name of an environment variable"),
    ],
)
def test_what_a_served_teacher_cannot_give_is_refused(
    teacher: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(teacher, **sections)
