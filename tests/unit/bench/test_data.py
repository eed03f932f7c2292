"""`pocl bench data`: all contenders make the same tokens, and its table has the ratios."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from pocl_ds.bench import data, data_worker
from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import RecipeError
from pocl_ds.models.load import load_tokenizer


def test_contenders_make_the_same_tokens_and_masks(tmp_path: Path) -> None:
    data.write_tokenizer(tmp_path / "tokenizer")
    data.write_records(tmp_path / "records.jsonl", 150)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    source = tmp_path / "records.jsonl"
    data_worker.preprocess_records(source, tokenizer, 1, tmp_path)
    rows = {}
    for split in ("train", "validation", "test"):
        samples = TokenizedSplit.open(tmp_path / "run" / "data", split)
        for row in range(len(samples)):
            rows[samples.tokens(row).tobytes()] = samples.loss_mask(row).tolist()
    mapped = data_worker.map_records(source, tokenizer, 1, tmp_path, mask=True)
    assert len(rows) == 150
    for record in mapped:
        # The line break after the end of the last turn is not part of the turn.
        ids = np.array(record["input_ids"][:-1], np.uint32)
        mask = rows[ids.tobytes()]
        assert mask == [bool(value) for value in record["completion_mask"][:-1]]
        assert 150 < len(mask) < 250
    assert isinstance(mapped, datasets.Dataset)


def test_table_has_a_row_for_each_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ratios are of the same round, since other work on the machine slows whole rounds."""
    seconds = {data.POCL: 2.0, data.MAP: 1.0, data.MAP_WITH_MASK: 4.0}
    rounds = iter(range(100))
    monkeypatch.setattr(
        data,
        "_run_worker",
        lambda contender, processes, *_: (
            seconds[contender] * (1 + next(rounds) // 6) / processes,
            3.0,
            100.0,
        ),
    )
    lines: list[str] = []
    rows = data.run(["200", "--tokenizer", str(tmp_path)], lines.append, rounds=2)
    assert len(rows) == 6 and len(lines) == 8
    for row in rows:
        assert row["cpu_us"] == 1e6 * 3.0 / 200
        assert row["of_map"] == [1 / seconds[row["contender"]]] * 2
        assert row["rates"] == [
            200 * row["processes"] / seconds[row["contender"]] / n for n in (1, 2)
        ]


@pytest.mark.parametrize(
    "arguments", [["ten"], ["50"], ["--tokenizer"], ["--tokenizer", "nowhere"]]
)
def test_other_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(RecipeError):
        data.run(arguments)
