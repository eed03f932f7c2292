"""The files of a data source: one file, a list, a pattern, or a folder, and the splits in them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pocl_ds.config.data import COMPRESSED_ENDINGS, DATA_ENDINGS, HELD_OUT_SPLITS, TEXT_ENDINGS
from pocl_ds.errors import DataError

Name = TypeVar("Name", bound=str)

# Names of splits in the names of files and folders, as `datasets` reads them.
SPLIT_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_KEYWORD = {word: split for split, words in SPLIT_KEYWORDS.items() for word in words}
# `train-00000-of-00003.parquet`, `train_sft-00000-of-00003.parquet`, `dev.jsonl`, `test_2.csv`
SHARD = re.compile(r"(?P<name>.+)-\d{3,}-of-\d{3,}\b")
FIRST_WORD = re.compile(r"[a-z]+")
# Files beside the shards that describe a dataset.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
PATTERN_CHARACTERS = frozenset("*?[")


def data_ending(path: Path) -> str | None:
    """The ending that says how to read a file, in lower case and without that of a compression;
    None if it is not known. Only text files can be compressed.
    """
    suffix = path.suffix.lower()
    if suffix in COMPRESSED_ENDINGS:
        inner = Path(path.stem).suffix.lower()
        return inner if inner in TEXT_ENDINGS else None
    return suffix if suffix in DATA_ENDINGS else None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder: a Dataset or a DatasetDict."""
    names = ("dataset_dict.json",), ("state.json", "dataset_info.json")
    return any(all(os.path.isfile(folder / name) for name in group) for group in names)


def source_files(
    source: str | Sequence[str], split: str, *, needs_split: bool = False, setting: str = "data"
) -> list[Path] | None:
    """The files, and folders of `save_to_disk`, that hold a split of a source, in reading order.

    None if the source is the name of a dataset on the Hub. needs_split: refuse files whose names
    tell no split; otherwise they are read for every split. setting: the section of the recipe, for
    messages. Raises DataError.
    """
    if isinstance(source, str):
        return _files_of_name(source, split, needs_split, setting)
    files: list[Path] = []
    for name in source:
        matches = _files_of_name(name, split, needs_split, setting)
        if matches is None:
            raise DataError(
                f"data file {name} does not exist: check the path; datasets of the Hub are sources "
                "of their own in data.sources"
            )
        if repeated := next((path for path in matches if path in files), None):
            raise DataError(
                f"data file {repeated} occurs twice in the list of {setting}.source: remove one"
            )
        files += matches
    return files


def local_files(source: str | Sequence[str]) -> list[Path]:
    """Every local file of a source, whatever its split; none for a Hub name or a missing file.

    A folder of `save_to_disk` stands for the files in it.
    """
    files: list[Path] = []
    for name in [source] if isinstance(source, str) else source:
        path = Path(os.path.expanduser(name))
        if os.path.isfile(path):
            files.append(path)
        elif os.path.isdir(path):
            files += _all_files(path) if is_saved_dataset(path) else _data_files_below(path)
        elif _is_pattern(name):
            for match in _matches(path):
                files += local_files(str(match))
    return files


def choose_split(
    names: Collection[Name], requested: str, owner: str, setting: str = "data"
) -> Name:
    """The name of a split among those that exist: the requested one, or a synonym such as `dev`.

    owner: file or folder, for messages. Raises DataError.
    """
    if requested in names:
        return next(name for name in names if name == requested)
    meaning = SPLIT_OF_KEYWORD.get(requested.lower(), requested)
    for name in names:
        if SPLIT_OF_KEYWORD.get(name.lower(), name) == meaning:
            return name
    raise DataError(
        f"{owner} holds the splits {', '.join(names)}, and not {requested!r}: set "
        f"{_split_field(setting)} to one of them"
    )


def _split_field(setting: str) -> str:
    """The recipe field that names the split of a section such as `data` or `data.test`."""
    for split in HELD_OUT_SPLITS:
        if setting in (f"data.{split}", f"data.hub_{split}_split"):
            return f"data.hub_{split}_split"
    return f"{setting}.hub_split"


def _files_of_name(name: str, split: str, needs_split: bool, setting: str) -> list[Path] | None:
    path = Path(os.path.expanduser(name))
    known = ", ".join(DATA_ENDINGS)
    if os.path.isdir(path):
        return _files_of_folder(path, split, needs_split, setting)
    if os.path.isfile(path):
        if data_ending(path) is None:
            problem = "has an unknown file type"
            if path.suffix.lower() in COMPRESSED_ENDINGS:
                problem = "is compressed, and no .jsonl, .json, .csv or .tsv file"
            raise DataError(f"data file {name} {problem}: give a {known} file or a Hub name")
        return [path]
    if _is_pattern(name):
        matches = [match for match in _matches(path) if data_ending(match) or os.path.isdir(match)]
        if not matches:
            raise DataError(f"no data file matches {name}: check the pattern")
        files = [match for match in matches if os.path.isfile(match)]
        if not files:  # folders only
            return [
                file
                for match in matches
                for file in _files_of_folder(match, split, needs_split, setting)
            ]
        _check_one_kind(files, name)
        return files
    if os.path.exists(path):
        raise DataError(f"data file {name} is not a file: check the path")
    if data_ending(path) is not None or name.startswith(("/", ".", "~")):
        raise DataError(f"data file {name} does not exist: check the path")
    return None


def _is_pattern(name: str) -> bool:
    return not PATTERN_CHARACTERS.isdisjoint(name)


def _matches(path: Path) -> list[Path]:
    """What a pattern matches, sorted; `**` stands for any depth of folders."""
    return sorted(Path(match) for match in glob.glob(str(path), recursive=True))


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _data_files_below(folder: Path) -> list[Path]:
    """The data files in a folder and the folders below it, sorted; hidden ones are left out."""
    return [
        path
        for path in _all_files(folder)
        if data_ending(path)
        and path.name not in DESCRIPTIONS
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]


def _files_of_folder(folder: Path, split: str, needs_split: bool, setting: str) -> list[Path]:
    if is_saved_dataset(folder):
        return [folder]
    files = _data_files_below(folder)
    if not files:
        raise DataError(
            f"data folder {folder} holds no {', '.join(DATA_ENDINGS)} file: check the path"
        )
    files_by_split: dict[str | None, list[Path]] = {}
    for path in files:
        files_by_split.setdefault(_split_in_name(path.relative_to(folder)), []).append(path)
    if set(files_by_split) == {None}:
        if needs_split:
            raise DataError(
                f"no file in {folder} has a split such as {split} in its name: name files for each "
                "split instead (data.source, data.validation, data.test)"
            )
    elif None in files_by_split:
        raise DataError(
            f"data folder {folder} holds {files_by_split[None][0].name} beside files of the splits "
            f"{', '.join(sorted(filter(None, files_by_split)))}: name those to read by a pattern, "
            f"as in {folder}/train*"
        )
    else:
        names = sorted(filter(None, files_by_split))
        files = files_by_split[choose_split(names, split, f"data folder {folder}", setting)]
    _check_one_kind(files, str(folder))
    return files


def _split_in_name(path: Path) -> str | None:
    """The split that a file's name, or a folder above it, tells: `train_sft` of
    `train_sft-00000-of-00003.parquet`, `validation` of `dev/part_1.jsonl`.
    """
    stem = path.name.split(".")[0].lower()
    shard = SHARD.match(stem)
    word = FIRST_WORD.match(stem)
    if word and (split := SPLIT_OF_KEYWORD.get(word[0])):
        return shard["name"] if shard else split
    return next(
        (
            SPLIT_OF_KEYWORD[part.lower()]
            for part in reversed(path.parts[:-1])
            if part.lower() in SPLIT_OF_KEYWORD
        ),
        None,
    )


def _check_one_kind(files: Iterable[Path], owner: str) -> None:
    """Raise DataError if files have different endings, since some may not be meant."""
    kinds = sorted({".jsonl" if kind == ".ndjson" else kind for kind in map(_kind, files)})
    if len(kinds) > 1:
        raise DataError(
            f"{owner} holds files of several kinds ({', '.join(kinds)}): name those to read by a "
            f"pattern, as in *{kinds[-1]}"
        )


def _kind(path: Path) -> str:
    return data_ending(path) or path.suffix
