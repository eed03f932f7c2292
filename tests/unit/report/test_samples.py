"""Training samples on the report's page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocl_ds.data.conversation import Message, Sample
from pocl_ds.errors import ArtifactError
from pocl_ds.report.samples import read_sample_rows
from pocl_ds.workflow.run_dir import RunDirectory


def test_a_conversation_shows_who_says_what(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    turns = (("system", "Be brief."), ("user", "One?"), ("assistant", "1."), ("user", "Two?"))
    messages = (*(Message(*turn) for turn in turns), Message("assistant", "2."))
    samples = [Sample.from_instruction("a", "Say.", "It.", input="x"), Sample("b", messages)]
    run.data.mkdir()
    path = run.data / "train.jsonl"
    path.write_text("".join(sample.to_json() + "\n" for sample in samples))
    run.ranking.mkdir()
    np.save(run.ranking / "order.npy", [1, 0])
    hard, easy = read_sample_rows(run, 2, 10_000).rows
    assert (hard.id, hard.reference) == ("b", "2.")
    assert hard.prompt == "system: Be brief.\n\nuser: One?\n\nassistant: 1.\n\nuser: Two?"
    assert (easy.prompt, easy.reference, easy.response) == ("Say.\n\nx", "It.", None)
    path.write_text('{"id": "a"}\n{"id": "b"}\n')
    with pytest.raises(ArtifactError, match="train.jsonl line 1 is damaged: remove"):
        read_sample_rows(run, 2, 10_000)
