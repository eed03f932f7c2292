"""What dtype `auto` is on each device, and that the log has it."""

from __future__ import annotations

import logging

import pytest
import torch

from pocl_ds.models import dtypes
from pocl_ds.models.dtypes import resolve_dtype


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_auto_depends_on_the_device(
    device: str, dtype: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes._log_once.cache_clear()
    monkeypatch.setattr(dtypes.log, "propagate", True)
    caplog.set_level(logging.INFO, logger="pocl_ds")
    for _ in range(2):
        assert resolve_dtype("auto", torch.device(device)) == dtype
    assert [record.message for record in caplog.records] == [
        f"dtype auto: {dtype} on this {'CPU' if device == 'cpu' else 'GPU'}"
    ]


def test_explicit_dtypes_are_returned_unchanged() -> None:
    assert resolve_dtype("float16", torch.device("cpu")) == "float16"
