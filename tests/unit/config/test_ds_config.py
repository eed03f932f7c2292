"""DeepSpeed configurations: "auto" is filled from the recipe, contradictions are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import get_zero_config

from pocl_ds.config import TrainConfig
from pocl_ds.config.ds_config import (
    ZeroSizes,
    load_ds_config,
    resolve_student,
    resolve_teacher,
    shipped_descriptions,
)
from pocl_ds.errors import RecipeError

TRAIN = TrainConfig(
    batch_size=32,
    micro_batch_size=4,
    lr=3e-4,
    min_lr=1e-6,
    weight_decay=0.02,
    max_grad_norm=0.5,
    betas=(0.9, 0.95),
)


def write(folder: Path, name: str, **changes: Any) -> str:
    """A copy of a shipped configuration with some values changed; `a__b` is a path."""
    tree = load_ds_config(name)
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    file = folder / "changed.json"
    file.write_text(json.dumps(tree))
    return str(file)


STUDENTS = [
    "student_zero2",
    "student_zero3",
    "student_zero3_nodes",
    "student_zero3_offload",
    "student_zero3_overlap",
]
TEACHERS = ["teacher_zero3", "teacher_zero3_offload", "teacher_zero3_overlap"]


def test_every_shipped_configuration_says_when_to_use_it() -> None:
    descriptions = shipped_descriptions()
    assert sorted(descriptions) == STUDENTS + TEACHERS
    assert all(text.endswith(".") for text in descriptions.values())
    assert "description" not in load_ds_config("student_zero3")


@pytest.mark.parametrize("name", STUDENTS + TEACHERS)
def test_deepspeed_accepts_every_shipped_configuration(name: str) -> None:
    """Each key of its ZeRO section, resolved for two nodes of two ranks, is one that DeepSpeed
    knows, with a value that it takes.
    """
    sizes, dtype = ZeroSizes(hidden_size=64, ranks_per_node=2), "bfloat16"
    tree = (
        resolve_student(name, train=TRAIN, dtype=dtype, ranks=4, sizes=sizes)
        if name in STUDENTS
        else resolve_teacher(name, dtype=dtype, ranks=4, micro_batch_size=4, sizes=sizes)
    )
    assert tree is not None
    zero = get_zero_config(tree)  # an unknown key is an error
    assert zero.stage == (2 if name == "student_zero2" else 3)
    if name == "student_zero3_nodes":
        assert zero.zero_hpz_partition_size == 2
    if name.endswith(("nodes", "overlap")):
        assert zero.overlap_comm and zero.prefetch_bucket_size == 12 * 64**2
        assert zero.param_persistence_threshold == 640


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "group"), [(8, 4, 4), (4, 4, 1), (1, 1, 1), (7, 4, 1), (8, None, 1)]
)
def test_weights_are_copied_within_nodes_only_if_there_are_several(
    ranks: int, ranks_per_node: int | None, group: int
) -> None:
    """And not if the nodes have different numbers of ranks, which DeepSpeed refuses."""
    sizes = ZeroSizes(ranks_per_node=ranks_per_node)
    tree = resolve_student(
        "student_zero3_nodes", train=TRAIN, dtype="bfloat16", ranks=ranks, sizes=sizes
    )
    assert tree["zero_optimization"]["zero_hpz_partition_size"] == group


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_student_configuration_is_complete(name: str, dtype: str, ranks: int) -> None:
    tree = resolve_student(name, train=TRAIN, dtype=dtype, ranks=ranks)
    assert '"auto"' not in json.dumps(tree)
    assert (tree["train_micro_batch_size_per_gpu"], tree["gradient_accumulation_steps"]) == (4, 1)
    assert tree["train_batch_size"] == 4 * ranks
    assert tree["gradient_clipping"] == 0.5
    assert tree["bf16"]["enabled"] is (dtype == "bfloat16")
    assert tree["optimizer"]["params"] == {
        "lr": 3e-4,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.02,
        "torch_adam": True,
        "fused": True,
    }
    assert ("offload_optimizer" in tree["zero_optimization"]) == ("offload" in name)


@pytest.mark.parametrize("name", ["teacher_zero3", "teacher_zero3_offload"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_teacher_configuration_is_complete(name: str, dtype: str) -> None:
    tree = resolve_teacher(name, dtype=dtype, ranks=2, micro_batch_size=3)
    assert '"auto"' not in json.dumps(tree)
    assert "optimizer" not in tree
    assert tree["train_batch_size"] == 6
    assert (tree["bf16"]["enabled"], tree["fp16"]["enabled"]) == (
        dtype == "bfloat16",
        dtype == "float16",
    )


def test_a_teacher_is_not_sharded_if_there_is_nothing_to_shard() -> None:
    def resolve(name: str | None, ranks: int) -> object:
        return resolve_teacher(name, dtype="float32", ranks=ranks, micro_batch_size=1)

    assert resolve("teacher_zero3", 1) is resolve(None, 2) is None
    assert resolve("teacher_zero3", 2) and resolve("teacher_zero3_offload", 1)


def test_resolving_does_not_change_the_file() -> None:
    before = load_ds_config("student_zero3")
    resolve_student("student_zero3", train=TRAIN, dtype="float32", ranks=2)
    assert load_ds_config("student_zero3") == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train_micro_batch_size_per_gpu": 16},
            ("train_micro_batch_size_per_gpu=16", "train.micro_batch_size", "4"),
        ),
        ({"train_batch_size": 64}, ("train_batch_size=64", "auto")),
        ({"gradient_accumulation_steps": 4}, ("gradient_accumulation_steps=4", "auto")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping=1.0", "train.max_grad_norm", "0.5")),
        ({"bf16__enabled": True}, ("bf16.enabled=True", "student.dtype", "False")),
        ({"fp16__enabled": True}, ("fp16.enabled=True", "student.dtype")),
        ({"optimizer__params__lr": 0.1}, ("optimizer.params.lr=0.1", "train.lr", "0.0003")),
        (
            {"optimizer__params__weight_decay": 0.0},
            ("optimizer.params.weight_decay=0.0", "train.weight_decay", "0.02"),
        ),
        ({"optimizer__type": "SGD"}, ("optimizer.type='SGD'", "AdamW")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler", "train.lr_restart")),
        (
            {"zero_optimization__reduce_bucket_size": "auto"},
            ("zero_optimization.reduce_bucket_size", "write a value"),
        ),
    ],
)
def test_a_contradiction_is_named(
    tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    name = write(tmp_path, "student_zero3", **changes)
    with pytest.raises(RecipeError) as caught:
        resolve_student(name, train=TRAIN, dtype="float32", ranks=2)
    for word in words:
        assert word in str(caught.value)


def test_a_value_that_agrees_with_the_recipe_is_accepted(tmp_path: Path) -> None:
    name = write(tmp_path, "student_zero3", gradient_clipping=0.5, optimizer__params__lr=3e-4)
    assert resolve_student(name, train=TRAIN, dtype="float32", ranks=1)["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    "path",
    [
        "gradient_clipping",
        "bf16",
        "bf16__enabled",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "optimizer__params",
        "optimizer__params__betas",
        "optimizer__params__weight_decay",
    ],
)
def test_missing_values_come_from_the_recipe(path: str, tmp_path: Path) -> None:
    """DeepSpeed's own defaults, no clipping and float32, are not those of the recipe."""
    tree = load_ds_config("student_zero3")
    *parents, leaf = path.split("__")
    node = tree
    for part in parents:
        node = node[part]
    removed = node.pop(leaf)
    file = tmp_path / "short.json"
    file.write_text(json.dumps(tree))
    resolved, expected = (
        resolve_student(name, train=TRAIN, dtype="bfloat16", ranks=2)
        for name in (str(file), "student_zero3")
    )
    if isinstance(removed, dict):  # fields that the recipe does not have stay DeepSpeed's
        expected["optimizer"]["params"] = {
            name: expected["optimizer"]["params"][name] for name in resolved["optimizer"]["params"]
        }
    assert resolved == expected


def test_a_number_instead_of_an_object_is_named(tmp_path: Path) -> None:
    for path, fault in (("optimizer__params", "optimizer.params"), ("bf16", "bf16")):
        with pytest.raises(RecipeError, match=rf"{fault} must be an object"):
            resolve_student(
                write(tmp_path, "student_zero3", **{path: 3}), train=TRAIN, dtype="float32", ranks=1
            )


@pytest.mark.parametrize("enabled", ["auto", False, True])
def test_an_unknown_dtype_contradicts_no_file(enabled: object, tmp_path: Path) -> None:
    """The machine that checks a recipe may have no GPU, and the one that trains may have some."""
    student = write(tmp_path, "student_zero3", bf16__enabled=enabled)
    resolved = resolve_student(student, train=TRAIN, dtype="auto", ranks=2)
    assert resolved["bf16"]["enabled"] is (enabled is True)
    teacher = write(tmp_path, "teacher_zero3", bf16__enabled=enabled)
    assert resolve_teacher(teacher, dtype="auto", ranks=2, micro_batch_size=1) is not None


def test_float16_students_are_refused() -> None:
    with pytest.raises(RecipeError, match="bfloat16"):
        resolve_student("student_zero3", train=TRAIN, dtype="float16", ranks=1)


@pytest.mark.parametrize(
    ("name", "word"), [("student_zero3", "optimizer"), ("student_zero2", "optimizer")]
)
def test_a_teacher_has_no_optimizer(name: str, word: str, tmp_path: Path) -> None:
    changed = write(
        tmp_path, name, gradient_clipping=1.0, optimizer={"type": "AdamW", "params": {}}
    )
    with pytest.raises(RecipeError, match=word):
        resolve_teacher(changed, dtype="float32", ranks=1, micro_batch_size=1)


def test_a_teacher_needs_zero_stage_3(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="stage=2"):
        resolve_teacher(
            write(tmp_path, "teacher_zero3", zero_optimization__stage=2),
            dtype="float32",
            ranks=1,
            micro_batch_size=1,
        )


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="teacher_zero3_overlap: check the name"):
        load_ds_config("no_such")
    for text, word in (("{", "fix"), ("[1]", "object"), ("", "fix")):
        file = tmp_path / "broken.json"
        file.write_text(text)
        with pytest.raises(RecipeError, match=word) as caught:
            load_ds_config(str(file))
        assert "broken.json" in str(caught.value)
