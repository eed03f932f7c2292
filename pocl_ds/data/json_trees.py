"""Records of a JSON file that is one object: a record, splits, columns, or a list in a field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pocl_ds.data.field_names import FIELD_NAMES
from pocl_ds.data.source_files import SPLIT_OF_KEYWORD, choose_split
from pocl_ds.errors import DataError

# Fields whose text shows that an object is a record.
TEXT_FIELDS = ("instruction", "output", "prompt", "messages", "text")
TEXT_NAMES = frozenset(name for field in TEXT_FIELDS for name in FIELD_NAMES[field])
ROLE_KEYS = ("role", "from")


def records_of_object(
    tree: Mapping[str, Any], owner: str, split: str, setting: str = "data"
) -> tuple[Iterable[Any] | None, bool]:
    """The records of a file that holds one object, and whether it holds them in splits. The records
    are None if the object is a record itself.

    Known forms: `{"train": [...], "test": [...]}`; a list in a field, as in `{"version": 1, "data":
    [...]}`; columns, as lists or as pandas writes them with any `orient`; a single record. split,
    setting: see `choose_split`. owner: the file, for messages. Raises DataError if several lists
    could be meant.
    """
    if isinstance(tree.get("columns"), list) and isinstance(tree.get("data"), list):
        return _records_of_rows(tree["columns"], tree["data"], owner), False
    tables = {name: value for name, value in tree.items() if _is_table(value)}
    if _is_record(tree):
        return None, False
    splits = {name: tree[name] for name in tables if _first_word(name) in SPLIT_OF_KEYWORD}
    if splits and len(splits) == len(tables):
        return splits[choose_split(list(splits), split, owner, setting)], True
    if _are_columns(tree, tables):
        names = list(tree)
        return (dict(zip(names, row, strict=True)) for row in zip(*tree.values(), strict=True)), (
            False
        )
    if objects := _objects_of_equal_keys(tree):
        return _records_of_objects(objects), False
    if len(tables) > 1:
        raise DataError(
            f"{owner} holds several lists of records ({', '.join(tables)}): write the one to read "
            "into its own file"
        )
    if tables:
        return next(iter(tables.values())), False
    return None, False


def _is_table(value: Any) -> bool:
    """Whether a value is a list of records, and not of turns or plain values."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _is_turns(value: Any) -> bool:
    return _is_table(value) and all(any(key in turn for key in ROLE_KEYS) for turn in value)


def _is_record(tree: Mapping[str, Any]) -> bool:
    return any(
        name in TEXT_NAMES and (isinstance(value, str) or _is_turns(value))
        for name, value in tree.items()
    )


def _first_word(name: str) -> str:
    """`train` of `train_sft`."""
    return name.lower().replace("-", "_").split("_")[0]


def _are_columns(tree: Mapping[str, Any], tables: Mapping[str, Any]) -> bool:
    """Whether all values are lists of one length, of which at least one holds plain values."""
    values = list(tree.values())
    return (
        bool(values)
        and all(isinstance(value, list) for value in values)
        and len({len(value) for value in values}) == 1
        and len(tables) < len(values)
        and len(values[0]) > 0
    )


def _objects_of_equal_keys(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The tree if all its values are objects with the same keys, as pandas writes a table."""
    values = list(tree.values())
    if not values or not all(isinstance(value, dict) and value for value in values):
        return None
    if any(value.keys() != values[0].keys() for value in values):
        return None
    return dict(tree)


def _records_of_objects(objects: dict[str, dict[str, Any]]) -> Iterable[Any]:
    """Records of `{column: {row: value}}` or of `{row: {column: value}}`."""
    rows = next(iter(objects.values()))
    if all(map(_is_number, rows)) and not all(map(_is_number, objects)):
        return ({name: column[row] for name, column in objects.items()} for row in rows)
    return (
        record if _is_number(row) or "id" in record else {"id": row, **record}
        for row, record in objects.items()
    )


def _is_number(text: str) -> bool:
    return text.isdecimal()


def _records_of_rows(columns: list[Any], rows: list[Any], owner: str) -> Iterable[Any]:
    """Records of pandas' `orient="split"`."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(columns):
            raise DataError(
                f"{owner}: row {number} of data is no list of {len(columns)} values, as columns "
                "names: fix it"
            )
        yield dict(zip(map(str, columns), row, strict=True))
