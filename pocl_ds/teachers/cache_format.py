"""The format in which a teacher cache travels between runs and machines
(docs/teacher-cache-format.md): a folder of safetensors files, and `cache.json`, which is written
last and describes them.

A sample is found by a hash of its token ids and its loss mask, so that another run may have its
samples in another order, or fewer of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pocl_ds.data.tokenized import TokenizedSplit
from pocl_ds.errors import ArtifactError
from pocl_ds.losses.record_codec import RecordCodec
from pocl_ds.models.vocab import VocabMap
from pocl_ds.teachers.codecs import read_codec
from pocl_ds.workflow.files import file_digest, read_json, write_json

FORMAT, VERSION = "pocl_ds teacher cache", 1
METADATA = "cache.json"


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a teacher is. files: name of a file with weights or settings -> its size and
    digest. quantization: of the recipe.
    """

    label: str
    files: dict[str, list[Any]]
    quantization: str


@dataclass(frozen=True)
class DataIdentity:
    """How token ids were made. tokenizer: part of it -> digest. template: its `name` in the recipe,
    and the `sha256` of what a prompt depends on.
    """

    tokenizer: dict[str, str]
    template: dict[str, str]


@dataclass(frozen=True)
class ExportedTeacher:
    """The outputs of one teacher. folder: in the export. width, dtype: of what is stored of a
    token. state_dtype: of hidden states when they are read, None for records. error: what the
    outputs lose at each temperature, as it was measured.
    """

    folder: str
    model: ModelIdentity
    samples: int
    tokens: int
    width: int
    dtype: str
    state_dtype: str | None
    error: list[dict[str, float]] | None


@dataclass(frozen=True)
class CacheMetadata:
    """What `cache.json` holds.

    versions: of the packages that filled the cache. fingerprint: of the exported cache. codec:
    fields of the codec of records. hidden_dtype: how hidden states are stored. vocabulary: `size`
    of the ids that take part, and `sha256` of which. files: name below the folder -> its size and
    sha256.
    """

    versions: dict[str, str]
    fingerprint: str
    mode: str
    backend: str
    hidden_dtype: str
    codec: dict[str, Any] | None
    vocabulary: dict[str, Any]
    data: DataIdentity
    teachers: list[ExportedTeacher]
    files: dict[str, dict[str, Any]]

    def read_codec(self) -> RecordCodec | None:
        """The codec of the records; None for hidden states."""
        return read_codec(self.mode, self.codec) if self.codec else None

    def files_of(self, teacher: ExportedTeacher, pattern: str) -> list[str]:
        """Names of the files of a teacher that match a pattern, sorted."""
        return sorted(
            name
            for name in self.files
            if PurePosixPath(name).parent.parts[:1] == (teacher.folder,)
            and PurePosixPath(name).match(pattern)
        )


def vocabulary_identity(vocab: VocabMap) -> dict[str, Any]:
    """The number of ids that take part in the loss, and a digest of which they are and of the
    teacher's ids for them.
    """
    digest = hashlib.sha256(np.packbits(vocab.allowed).tobytes())
    if vocab.teacher_ids is not None:
        digest.update(vocab.teacher_ids.cpu().numpy().astype("<i8").tobytes())
    return {"size": vocab.size, "sha256": digest.hexdigest()}


def sample_key(split: TokenizedSplit, row: int) -> bytes:
    """sha256 of a sample's token ids (uint32, little-endian) and its loss mask (one byte for each
    token).
    """
    tokens = np.asarray(split.tokens(row)).astype("<u4").tobytes()
    mask = np.asarray(split.loss_mask(row)).astype(np.uint8).tobytes()
    return hashlib.sha256(tokens + mask).digest()


def write_metadata(folder: Path, metadata: CacheMetadata) -> None:
    """Write `cache.json`, after all other files."""
    tree = {"format": FORMAT, "version": VERSION, **asdict(metadata)}
    write_json(folder / METADATA, {**tree, "sha256": _tree_digest(tree)})


def read_metadata(folder: Path) -> CacheMetadata:
    """Read `cache.json`. Raises ArtifactError if it is missing, damaged, of another format or of a
    newer version.
    """
    path = folder / METADATA
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {METADATA}, which completes an exported teacher cache: check the "
            "path, or export again with `pocl cache-teacher --export`"
        )
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not that of an exported teacher cache: check the path")
    if isinstance(tree.get("version"), int) and tree["version"] > VERSION:
        raise ArtifactError(
            f"{path} has version {tree['version']} of the format, and this release reads up to "
            f"{VERSION}: install a newer pocl_ds"
        )
    digest = tree.pop("sha256", None)
    if digest != _tree_digest(tree) or any(".." in Path(name).parts for name in tree["files"]):
        raise ArtifactError(f"{path} is damaged (another checksum): copy or export it again")
    return _metadata_of_tree({field.name: tree[field.name] for field in fields(CacheMetadata)})


def _metadata_of_tree(tree: Mapping[str, Any]) -> CacheMetadata:
    teachers = [
        ExportedTeacher(**{**entry, "model": ModelIdentity(**entry["model"])})
        for entry in tree["teachers"]
    ]
    return CacheMetadata(**{**tree, "data": DataIdentity(**tree["data"]), "teachers": teachers})


def _tree_digest(tree: Mapping[str, Any]) -> str:
    text = json.dumps(tree, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def verify_files(folder: Path, metadata: CacheMetadata) -> None:
    """Read all files of an export. Raises ArtifactError that names the first one that is missing or
    differs, and says how many more do.
    """
    faults = []
    for name, expected in metadata.files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            faults.append(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}")
        elif file_digest(path) != expected:
            faults.append(f"{path} has another checksum")
    if faults:
        more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
        raise ArtifactError(f"{faults[0]}{more}: copy the exported teacher cache again")


class ExportedOutputs:
    """The outputs of one teacher in an export, found by sample and read row by row."""

    def __init__(self, folder: Path, metadata: CacheMetadata, teacher: ExportedTeacher) -> None:
        """Raises ArtifactError for a file that is not in the format."""
        self._places: dict[bytes, list[tuple[int, int, int]]] = {}
        self._taken: dict[bytes, int] = {}
        self._outputs: list[Any] = []
        for name in metadata.files_of(teacher, "shard-*.safetensors"):
            try:
                file = safe_open(folder / name, framework="pt")
                keys, counts = (file.get_tensor(part).numpy() for part in ("keys", "loss_tokens"))
                outputs = file.get_slice("outputs")
            except (SafetensorError, OSError) as error:
                raise ArtifactError(
                    f"{folder / name} is not a file of an exported teacher cache ({error}): "
                    "export it again"
                ) from None
            ends = np.cumsum(counts).tolist()
            for key, start, end in zip(keys, [0, *ends[:-1]], ends, strict=True):
                places = self._places.setdefault(key.tobytes(), [])
                places.append((len(self._outputs), start, end))
            self._outputs.append(outputs)

    def find(self, split: TokenizedSplit, row: int) -> tuple[int, int, int] | None:
        """Where the outputs of a sample are; None if the export lacks it.

        Several samples may have the same tokens, and sampled records differ between them: each call
        gives the next of these samples, and at the end the last one again.
        """
        key = sample_key(split, row)
        places = self._places.get(key)
        if places is None:
            return None
        number = self._taken.get(key, 0)
        self._taken[key] = number + 1
        return places[min(number, len(places) - 1)]

    def read(self, place: tuple[int, int, int]) -> Tensor:
        """The outputs at a place, as they are stored: [loss tokens, width]."""
        number, start, end = place
        outputs: Tensor = self._outputs[number][start:end]
        return outputs
