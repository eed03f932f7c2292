"""DeepSpeed configurations: JSON files chosen by name, whose "auto" values, and those that a file
leaves out and the recipe has, are filled in from the recipe, here only.

The trainer drives gradient accumulation itself, so DeepSpeed is told of one micro-batch a step.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from pocl_ds.config import TrainConfig
from pocl_ds.errors import RecipeError
from pocl_ds.resources import DS_CONFIGS

NUMERIC = (
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
)
Values = dict[
    tuple[str, ...], tuple[Any, str]
]  # path in the JSON -> (the recipe's value, the recipe's field)


def load_ds_config(name: str) -> dict[str, Any]:
    """A configuration by its name in ds_configs/ or by its path. Raises RecipeError where it cannot
    be read.
    """
    path = DS_CONFIGS / f"{name}.json"
    if not os.path.isfile(path):
        path = Path(name)
    if not os.path.isfile(path):
        known = ", ".join(sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
        raise RecipeError(
            f"ds_config {name!r} is neither a file nor one of {known}: check the name"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"ds_config {path} cannot be read ({error.strerror}): check the file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"ds_config {path} is not valid JSON ({error}): mend the file") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"ds_config {path} must hold an object: start from one in {DS_CONFIGS}")
    for section in ("zero_optimization", "optimizer", "bf16", "fp16"):
        if not isinstance(tree.get(section, {}), dict):
            raise RecipeError(
                f"ds_config {path}: {section} must be an object: start from one in {DS_CONFIGS}"
            )
    return tree


def resolve_student(name: str, *, train: TrainConfig, dtype: str, ranks: int) -> dict[str, Any]:
    """The student's configuration without "auto". Raises RecipeError where the file and the recipe
    contradict.
    """
    if dtype == "float16":
        raise RecipeError(
            "student.dtype=float16 cannot be trained without loss scaling: use bfloat16 or float32"
        )
    values = _sizes(train.micro_batch_size, ranks) | {
        ("gradient_clipping",): (train.max_grad_norm, "train.max_grad_norm"),
        ("bf16", "enabled"): (dtype == "bfloat16", "student.dtype"),
        ("fp16", "enabled"): (False, "student.dtype"),
        ("optimizer", "params", "lr"): (train.lr, "train.lr"),
        ("optimizer", "params", "betas"): (list(train.betas), "train.betas"),
        ("optimizer", "params", "eps"): (train.eps, "train.eps"),
        ("optimizer", "params", "weight_decay"): (train.weight_decay, "train.weight_decay"),
    }
    tree = _fill(name, values, ranks)
    kind = tree.get("optimizer", {}).get("type")
    if kind != "AdamW":
        raise RecipeError(
            f"ds_config {name}: optimizer.type={kind!r}: the student needs AdamW, as train.* "
            f"describes it"
        )
    if "scheduler" in tree:
        raise RecipeError(
            f"ds_config {name}: scheduler: the learning rate follows train.lr_restart, remove it "
            f"from the file"
        )
    return tree


def resolve_teacher(
    name: str | None, *, dtype: str, ranks: int, micro_batch_size: int
) -> dict[str, Any] | None:
    """The frozen teacher's configuration without "auto"; None where each rank holds it whole.

    That is where the recipe names none, and on a single rank, which has nothing to shard, unless
    parameters are offloaded. Raises RecipeError where the file holds an optimizer or a stage below
    3.
    """
    if name is None:
        return None
    values = _sizes(micro_batch_size, ranks) | {
        ("bf16", "enabled"): (dtype == "bfloat16", "teacher.dtype"),
        ("fp16", "enabled"): (dtype == "float16", "teacher.dtype"),
    }
    tree = _fill(name, values, ranks)
    for forbidden in ("optimizer", "scheduler"):
        if forbidden in tree:
            raise RecipeError(
                f"ds_config {name}: {forbidden}: the teacher is frozen, use a teacher_* "
                f"configuration"
            )
    stage = tree.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise RecipeError(
            f"ds_config {name}: zero_optimization.stage={stage}: a frozen model is sharded by "
            f"stage 3 only"
        )
    return None if ranks == 1 and "offload_param" not in tree["zero_optimization"] else tree


def numerics(name: str | None) -> dict[str, Any] | None:
    """What a configuration says of how numbers are kept and sent; all else says where they lie, and
    may change in a run.
    """
    if name is None:
        return None
    tree = load_ds_config(name)
    zero = {
        key: value
        for key, value in tree.get("zero_optimization", {}).items()
        if key.startswith("zero_quantized")
    }
    return {key: tree[key] for key in NUMERIC if key in tree} | zero or None


def _sizes(micro_batch_size: int, ranks: int) -> Values:
    return {
        ("train_micro_batch_size_per_gpu",): (micro_batch_size, "train.micro_batch_size"),
        ("train_batch_size",): (
            micro_batch_size * ranks,
            "train.micro_batch_size x ranks (accumulation is the trainer's)",
        ),
        ("gradient_accumulation_steps",): (1, "accumulation, which the trainer drives itself"),
    }


def _fill(name: str, values: Values, ranks: int) -> dict[str, Any]:
    tree = copy.deepcopy(load_ds_config(name))
    zero = tree.get("zero_optimization", {})
    if (
        zero.get("contiguous_gradients") == "auto"
    ):  # alone, a rank would copy its gradients into a bucket, and out of it
        zero["contiguous_gradients"] = ranks > 1
    for path, (value, field) in values.items():
        node: Any = tree
        for depth, part in enumerate(path[:-1], 1):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise RecipeError(
                    f"ds_config {name}: {'.'.join(path[:depth])} must be an object: start from "
                    f"one in {DS_CONFIGS}"
                )
        found = node.get(
            path[-1], "auto"
        )  # DeepSpeed's own defaults, as no clipping, are not the recipe's
        if found == "auto":
            node[path[-1]] = value
        elif found != value:
            raise RecipeError(
                f"ds_config {name}: {'.'.join(path)}={found!r} contradicts the recipe, where "
                f"{field} gives {value!r}: "
                'write "auto" there, or change the recipe'
            )
    left = _autos(tree)
    if left:
        raise RecipeError(
            f'ds_config {name}: {left}="auto" has no counterpart in a recipe: write a value'
        )
    return tree


def _autos(tree: Any, prefix: str = "") -> str:
    """Dotted path of the first "auto" that is left, or an empty text."""
    if isinstance(tree, dict):
        return next(
            (found for key, value in tree.items() if (found := _autos(value, f"{prefix}.{key}"))),
            "",
        )
    return prefix.lstrip(".") if tree == "auto" else ""
