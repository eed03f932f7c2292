"""DeepSpeed configurations: JSON files by name, completed from the recipe.

Values that are "auto" or missing in a file come from the recipe; only this module inserts
them. The trainer accumulates gradients itself, so DeepSpeed's own accumulation is always 1.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ds.config.training import TrainConfig
from pocl_ds.errors import RecipeError, decode_fault, nearest_name
from pocl_ds.resources import DS_CONFIGS

# Top-level keys that change how numbers are stored or sent, and so the result of a training.
NUMERIC_KEYS = (
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
)
DESCRIPTION = "description"  # in a shipped file: when to use it; for people only
# Parameters of a decoder block per squared hidden size: four matrices of attention, and an MLP of
# four times the width or three matrices of 8/3. ZeRO-3 gathers so much ahead of time.
BLOCK_MATRICES = 12
# Parameters of up to so many hidden vectors, norms and biases, stay on every rank.
PERSISTENT_VECTORS = 10
# A recipe is checked before its models are read, when any size will do.
UNREAD_HIDDEN_SIZE = 1024
# Path in the JSON -> (value, the recipe's field that it comes from).
Values = dict[tuple[str, ...], tuple[Any, str]]


def load_ds_config(name: str) -> dict[str, Any]:
    """Read a configuration by its name in ds_configs/ or by its path. Raises RecipeError."""
    path = DS_CONFIGS / f"{name}.json"
    if not os.path.isfile(path):
        path = Path(name)
    if not os.path.isfile(path):
        known = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
        nearest = nearest_name(name, known)
        raise RecipeError(
            f"ds_config {name!r} is neither a file nor one of {', '.join(known)}: "
            + (f"did you mean {nearest}?" if nearest else "check the name")
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"ds_config {path} cannot be read ({error.strerror}): check the file"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"ds_config {path} is not UTF-8 ({decode_fault(error)}): convert it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"ds_config {path} is not valid JSON ({error}): fix the file") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"ds_config {path} must be an object: start from one in {DS_CONFIGS}")
    tree.pop(DESCRIPTION, None)
    for section in ("zero_optimization", "optimizer", "bf16", "fp16"):
        if not isinstance(tree.get(section, {}), dict):
            raise RecipeError(
                f"ds_config {path}: {section} must be an object: start from one in {DS_CONFIGS}"
            )
    return tree


@dataclass(frozen=True)
class ZeroSizes:
    """What the sizes of ZeRO-3's buffers and groups follow from.

    hidden_size: of the model; ranks_per_node: of this run, None for one node.
    """

    hidden_size: int = UNREAD_HIDDEN_SIZE
    ranks_per_node: int | None = None

    def values(self, ranks: int) -> dict[str, int]:
        """Value of each key of zero_optimization that may be "auto"."""
        nodes = ranks // self.ranks_per_node if self.ranks_per_node else 1
        is_hierarchical = nodes > 1 and nodes * (self.ranks_per_node or 0) == ranks
        return {
            "stage3_prefetch_bucket_size": BLOCK_MATRICES * self.hidden_size**2,
            "stage3_param_persistence_threshold": PERSISTENT_VECTORS * self.hidden_size,
            # On one node, and on nodes with different numbers of ranks, 1: no second copy.
            "zero_hpz_partition_size": (self.ranks_per_node or 1) if is_hierarchical else 1,
        }


def shipped_descriptions() -> dict[str, str]:
    """Name of each shipped configuration, and when to use it."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))[DESCRIPTION]
        for path in sorted(DS_CONFIGS.glob("*.json"))
    }


def resolve_student(
    name: str, *, train: TrainConfig, dtype: str, ranks: int, sizes: ZeroSizes = ZeroSizes()
) -> dict[str, Any]:
    """The student's configuration without "auto".

    dtype: the name of a torch dtype; with "auto" (not known yet) the dtype that the file enables.
    sizes: of the student. Raises RecipeError if the file and the recipe contradict each other.
    """
    dtype = _dtype_of_file(name) if dtype == "auto" else dtype
    if dtype == "float16":
        raise RecipeError(
            "student.dtype=float16 cannot be trained without loss scaling: use bfloat16 or float32"
        )
    values = _batch_values(train.micro_batch_size, ranks) | {
        ("gradient_clipping",): (train.max_grad_norm, "train.max_grad_norm"),
        ("bf16", "enabled"): (dtype == "bfloat16", "student.dtype"),
        ("fp16", "enabled"): (False, "student.dtype"),
        ("optimizer", "params", "lr"): (train.lr, "train.lr"),
        ("optimizer", "params", "betas"): (list(train.betas), "train.betas"),
        ("optimizer", "params", "eps"): (train.eps, "train.eps"),
        ("optimizer", "params", "weight_decay"): (train.weight_decay, "train.weight_decay"),
    }
    tree = _fill(name, values, ranks, sizes)
    optimizer = tree.get("optimizer", {}).get("type")
    if optimizer != "AdamW":
        raise RecipeError(
            f"ds_config {name}: optimizer.type={optimizer!r}: the fields of section train are "
            "those of AdamW, so set it to AdamW"
        )
    if "scheduler" in tree:
        raise RecipeError(
            f"ds_config {name}: scheduler: train.lr_restart and train.min_lr define the learning "
            "rate, so remove it from the file"
        )
    return tree


def resolve_teacher(
    name: str | None,
    *,
    dtype: str,
    ranks: int,
    micro_batch_size: int,
    sizes: ZeroSizes = ZeroSizes(),
) -> dict[str, Any] | None:
    """The frozen teacher's configuration without "auto", or None if every rank holds a complete
    copy. sizes: of the teacher.

    That is the case if `name` is None, and on a single rank, which has nothing to shard,
    unless parameters are offloaded. Raises RecipeError if the file has an optimizer, or another
    zero_stage than 3.
    """
    if name is None:
        return None
    dtype = _dtype_of_file(name) if dtype == "auto" else dtype
    values = _batch_values(micro_batch_size, ranks) | {
        ("bf16", "enabled"): (dtype == "bfloat16", "teacher.dtype"),
        ("fp16", "enabled"): (dtype == "float16", "teacher.dtype"),
    }
    tree = _fill(name, values, ranks, sizes)
    for key in ("optimizer", "scheduler"):
        if key in tree:
            raise RecipeError(
                f"ds_config {name}: {key}: the teacher is not trained, so use a teacher_* "
                "configuration"
            )
    zero_stage = tree.get("zero_optimization", {}).get("stage")
    if zero_stage != 3:
        raise RecipeError(
            f"ds_config {name}: zero_optimization.stage={zero_stage}: only stage 3 shards a model "
            "that is not trained, so set it to 3"
        )
    return None if ranks == 1 and "offload_param" not in tree["zero_optimization"] else tree


def numeric_settings(name: str | None) -> dict[str, Any] | None:
    """The values of a configuration that change results; all others may change during a run."""
    if name is None:
        return None
    tree = load_ds_config(name)
    zero = {
        key: value
        for key, value in tree.get("zero_optimization", {}).items()
        if key.startswith("zero_quantized")
    }
    return {key: tree[key] for key in NUMERIC_KEYS if key in tree} | zero or None


def _dtype_of_file(name: str) -> str:
    tree = load_ds_config(name)
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if tree.get(section, {}).get("enabled") is True:
            return dtype
    return "float32"


def _batch_values(micro_batch_size: int, ranks: int) -> Values:
    return {
        ("train_micro_batch_size_per_gpu",): (micro_batch_size, "train.micro_batch_size"),
        ("train_batch_size",): (
            micro_batch_size * ranks,
            "train.micro_batch_size x ranks (the trainer accumulates gradients itself)",
        ),
        ("gradient_accumulation_steps",): (1, "the trainer, which accumulates gradients itself,"),
    }


def _fill(name: str, values: Values, ranks: int, sizes: ZeroSizes) -> dict[str, Any]:
    """The file with the recipe's values in place of "auto" and of missing ones, and with the sizes
    in place of "auto".
    """
    tree = copy.deepcopy(load_ds_config(name))
    zero = tree.get("zero_optimization", {})
    # On one rank, contiguous gradients would only copy every gradient into a bucket and back.
    if zero.get("contiguous_gradients") == "auto":
        zero["contiguous_gradients"] = ranks > 1
    zero.update({key: n for key, n in sizes.values(ranks).items() if zero.get(key) == "auto"})
    for path, (value, field) in values.items():
        node: Any = tree
        for depth, part in enumerate(path[:-1], 1):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise RecipeError(
                    f"ds_config {name}: {'.'.join(path[:depth])} must be an object: start from one "
                    f"in {DS_CONFIGS}"
                )
        # A missing value also comes from the recipe: DeepSpeed's defaults differ (no clipping).
        current = node.get(path[-1], "auto")
        if current == "auto":
            node[path[-1]] = value
        elif current != value:
            raise RecipeError(
                f"ds_config {name}: {'.'.join(path)}={current!r} contradicts the recipe, where "
                f'{field} gives {value!r}: write "auto" there, or change the recipe'
            )
    if unresolved := _first_auto(tree):
        raise RecipeError(
            f'ds_config {name}: {unresolved}="auto" has no counterpart in a recipe: write a value'
        )
    return tree


def _first_auto(tree: Any, path: str = "") -> str:
    """Dotted path of the first "auto" in the tree, or an empty text."""
    if isinstance(tree, dict):
        paths = (_first_auto(value, f"{path}.{key}") for key, value in tree.items())
        return next(filter(None, paths), "")
    return path.lstrip(".") if tree == "auto" else ""
