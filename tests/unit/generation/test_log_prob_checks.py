"""What is wrong with a teacher's largest log-probabilities that come from outside."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pocl_ds.config import TeacherEndpointConfig
from pocl_ds.generation.log_prob_checks import log_prob_problem
from pocl_ds.generation.served_model import SERVERS

HALF, QUARTER = math.log(0.5), math.log(0.25)


@pytest.mark.parametrize(
    ("ids", "log_probs", "problem"),
    [
        ([[1, 2]], [[HALF, QUARTER]], None),
        ([[1, 2], [2, 1]], [[HALF, HALF], [math.log(0.5005), HALF]], None),  # rounding alone
        ([[7]], [[HALF]], None),
        (np.empty((0, 2)), np.empty((0, 2)), None),
        ([[1, 2]], [[QUARTER, HALF]], "not log-probabilities in descending order"),
        ([[1, 2]], [[HALF, math.nan]], "not log-probabilities in descending order"),
        ([[1, 2]], [[HALF, -math.inf]], "not log-probabilities in descending order"),
        ([[1, 2]], [[0.0, QUARTER]], "sum to more than 1"),
        ([[1, 2]], [[1e4, HALF]], "sum to more than 1"),
        ([[1, 2], [3, 3]], [[HALF, QUARTER]] * 2, "an id that appears twice at one position"),
    ],
)
def test_problems(ids: list[list[int]], log_probs: list[list[float]], problem: str | None) -> None:
    found = log_prob_problem(np.array(ids), np.array(log_probs))
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize("server", list(SERVERS))
def test_only_requests_for_log_probabilities_name_their_limit(server: str) -> None:
    config = TeacherEndpointConfig.model_validate(
        {"urls": ["http://localhost:1"], "server": server}
    )
    texts = []
    for top_k in (None, 64):
        model = SERVERS[server](config, saved="nothing is lost", top_k=top_k)
        texts.append(model.endpoint.text.rejection_fields)
        model.close()
    assert "--max-logprobs" not in texts[0]
    assert "--max-logprobs of at least 64 (teacher_cache.top_k)" in texts[1]
