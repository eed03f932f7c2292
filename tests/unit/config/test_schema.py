"""Recipes: every fault is a RecipeError of one sentence, with the field and the remedy."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocl_ds.config import Recipe, TrainConfig, semantic_fields
from pocl_ds.config.recipe_file import check_recipe, dump_recipe, load_recipe
from pocl_ds.config.yaml_io import parse_yaml
from pocl_ds.errors import RecipeError
from pocl_ds.resources import RECIPES
from pocl_ds.workflow.steps import fingerprints

DATA = {"source": "d.jsonl"}
BASE: dict[str, Any] = {
    "name": "x",
    "data": DATA,
    "teacher": {"model": "t"},
    "student": {"model": "s"},
}


def recipe_tree(**values: Any) -> dict[str, Any]:
    """The base recipe with other values; `a__b` is field b of section a."""
    tree = copy.deepcopy(BASE)
    for path, value in values.items():
        *parents, leaf = path.split("__")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


BAD: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (recipe_tree(trian={}), ("trian", "did you mean train?")),
    (recipe_tree(train__batchsize=8), ("train.batchsize", "did you mean batch_size?")),
    (recipe_tree(student__prune__layers="1"), ("student.prune.layers", "drop_layers")),
    (recipe_tree(student__lora={"r": 0}), ("student.lora.r=0", "greater than or equal to 1")),
    (recipe_tree(student__lora={"dropout": 1}), ("student.lora.dropout=1", "less than 1")),
    (recipe_tree(student__lora={"width": 8}), ("student.lora.width", "use one of r, alpha")),
    (
        recipe_tree(student__lora={"target_modules": ""}),
        ("student.lora.target_modules=''", "write each name once"),
    ),
    (
        recipe_tree(student__lora={"target_modules": []}),
        ("student.lora.target_modules", "at least 1"),
    ),
    (
        recipe_tree(student__lora={"target_modules": "q_proj, q_proj"}),
        ("student.lora.target_modules", "write each name once"),
    ),
    (
        recipe_tree(student__lora={"target_modules": ["all-linear", "q_proj"]}),
        ("student.lora.target_modules", "write it alone"),
    ),
    (recipe_tree(student=None), ("student", "section")),
    ({"name": "x", "data": DATA, "teacher": {"model": "t"}}, ("student", "missing", "add it")),
    (
        {"name": "x", "teacher": {"model": "t"}, "student": {"model": "s"}},
        ("data", "missing", "add it"),
    ),
    (recipe_tree(data={}), ("data.source", "missing", "add it")),
    (recipe_tree(teacher__model=None), ("teacher.model=None", "it is empty, write a text")),
    (recipe_tree(train__batch_size="many"), ("train.batch_size='many'", "integer")),
    (recipe_tree(train__batch_size=0), ("train.batch_size=0", "greater than or equal to 1")),
    (recipe_tree(train__batch_size=True), ("train.batch_size=True", "number")),
    (
        recipe_tree(train__batch_size=10),
        ("train.batch_size=10", "train.micro_batch_size=8", "launch.ranks=1", "change one"),
    ),
    (recipe_tree(launch__ranks=3), ("train.batch_size=64", "launch.ranks=3", "change one")),
    (recipe_tree(train__lr=float("nan")), ("train.lr", "finite")),
    (
        recipe_tree(loss__thought_weight=-1),
        ("loss.thought_weight=-1", "greater than or equal to 0"),
    ),
    (recipe_tree(evaluate__span="thought"), ("evaluate.span='thought'", "response", "answer")),
    (recipe_tree(loss__thought_weight=float("inf")), ("loss.thought_weight", "finite")),
    (recipe_tree(loss__thought_weight="half"), ("loss.thought_weight='half'", "number")),
    (recipe_tree(train__lr=1e-8), ("train.min_lr=1e-07", "train.lr=1e-08")),
    (recipe_tree(train__lr_restart="linear"), ("train.lr_restart='linear'", "per_stage", "never")),
    (recipe_tree(curriculum__temperature=[0, 2]), ("curriculum.temperature", "greater than 0")),
    (recipe_tree(curriculum__temperature=[1.0]), ("curriculum.temperature", "missing")),
    (
        recipe_tree(curriculum__sft_ratio=[1.5, 0]),
        ("curriculum.sft_ratio", "less than or equal to 1"),
    ),
    (
        recipe_tree(train__engine="torch", student__dtype="bfloat16"),
        ("train.engine=torch", "bfloat16", "train.engine=deepspeed"),
    ),
    (
        recipe_tree(curriculum__num_subsets=5, data__max_train_samples=4),
        ("curriculum.num_subsets=5", "data.max_train_samples=4", "fewer subsets"),
    ),
    (recipe_tree(loss__name="kl"), ("loss", "'kl'", "did you mean")),
    (recipe_tree(loss={"name": "jsd", "options": {"skew": 0.1}}), ("jsd", "'skew'", "beta")),
    (recipe_tree(loss={"name": "fkl", "options": {"beta": 0.1}}), ("fkl", "'beta'", "no options")),
    (recipe_tree(loss__name="sft"), ("loss.name=sft", "teacher")),
    ({"name": "x", "data": DATA, "student": {"model": "s"}}, ("loss.name=fkl", "teacher.model")),
    (
        {
            "name": "x",
            "data": DATA,
            "student": {"model": "s", "heal_steps": 3},
            "loss": {"name": "sft"},
        },
        ("heal_steps=3", "set it to 0"),
    ),
    (
        {
            "name": "x",
            "data": DATA,
            "student": {"model": "s", "heal_steps": 3},
            "teacher": {"model": "t"},
            "train": {"warmup_steps": 3},
        },
        ("train.warmup_steps=3 is not less than the 3 steps", "heal longer"),
    ),
    (
        recipe_tree(prompt__max_prompt_tokens=512),
        ("max_prompt_tokens=512", "max_length=512", "smaller"),
    ),
    (recipe_tree(student__prune__drop_layers="ten"), ("student.prune.drop_layers='ten'", "10-19")),
    (
        recipe_tree(data__validation_fraction=0.6, data__test_fraction=0.5),
        ("validation_fraction", "less than 1"),
    ),
    (recipe_tree(evaluate__temperature=0), ("temperature=0", "one seed")),
    (recipe_tree(evaluate__seeds=[1, 1]), ("seed", "once")),
    (recipe_tree(evaluate__seeds=[]), ("evaluate.seeds", "at least 1")),
    (recipe_tree(name="a/b"), ("name='a/b': use letters, digits, dots",)),
    (
        recipe_tree(data={"sources": [{"source": "d.jsonl", "name": " a"}]}),
        ("data.sources.0.name=' a': write a name without spaces around it",),
    ),
    (
        recipe_tree(prompt__chat_template_kwargs={"1-x": 2}),
        ("prompt.chat_template_kwargs.1-x: the name of a variable has letters",),
    ),
    (
        recipe_tree(teacher__endpoint={"urls": ["localhost:8000"]}),
        ("teacher.endpoint.urls.0='localhost:8000': write http:// or https:// and the address",),
    ),
    (
        recipe_tree(teacher__endpoint={"urls": []}),
        ("teacher.endpoint.urls=[]: it needs at least 1 entry",),
    ),
    (
        recipe_tree(policy={"name": "gkd", "lmbda": 1.5}),
        ("policy.lmbda=1.5", "less than or equal to 1"),
    ),
    (
        recipe_tree(policy={"name": "gkd", "lmbda": -0.1}),
        ("policy.lmbda=-0.1", "greater than or equal to 0"),
    ),
    (recipe_tree(policy__name="gkd"), ("policy.name=gkd", "curriculum.sft_ratio=[0, 0]")),
    (
        recipe_tree(
            policy__name="gkd", curriculum__sft_ratio=[0, 0], teacher__mode="cached_hidden_states"
        ),
        ("policy.name=gkd", "teacher.mode=online"),
    ),
    (
        recipe_tree(policy__name="gkd", curriculum__sft_ratio=[0, 0], teacher__mode="cached_topk"),
        ("policy.name=gkd", "teacher.mode=cached_topk"),
    ),
    (
        recipe_tree(policy__name="gkd", curriculum__sft_ratio=[0, 0], baseline__enabled=True),
        ("baseline.sft_ratio=0",),
    ),
    (
        recipe_tree(
            policy__name="distillm", curriculum__sft_ratio=[0, 0], data__max_train_samples=99
        ),
        ("policy.replay_buffer_size=1000", "=99", "smaller"),
    ),
    (
        recipe_tree(
            policy__name="distillm", curriculum__sft_ratio=[0, 0], train__validate_max_samples=0
        ),
        ("train.validate_max_samples",),
    ),
    (
        recipe_tree(policy__name="distillm", curriculum__sft_ratio=[0, 0]),
        ("policy.name=distillm", "train.validate_every_n_steps=null", "a number"),
    ),
    (recipe_tree(policy__name="seqkd"), ("policy.name=seqkd", "loss.name=sft")),
    (
        recipe_tree(policy__name="seqkd", loss__name="sft", teacher__mode="cached_topk"),
        ("policy.name=seqkd", "teacher.mode=cached_topk"),
    ),
    (
        {
            "name": "x",
            "data": DATA,
            "student": {"model": "s"},
            "policy": {"name": "gkd"},
            "loss": {"name": "sft"},
        },
        ("gkd", "teacher.model"),
    ),
    (
        recipe_tree(policy={"name": "mixture", "shares": {"student": 0.5}}),
        ("policy.shares", "sum to 1"),
    ),
    (
        recipe_tree(policy={"name": "mixture", "shares": {"data": 0, "student": 1}}),
        ("policy.name=mixture", "curriculum.sft_ratio=[0, 0]"),
    ),
    (
        recipe_tree(
            policy={"name": "mixture", "shares": {"data": 0, "teacher": 1}},
            teacher__mode="cached_topk",
        ),
        ("policy.shares.teacher=1", "teacher.mode=online"),
    ),
    (
        recipe_tree(
            policy={"name": "mixture", "shares": {"data": 0, "teacher": 1}},
            teacher__ensemble=[{"model": "o"}],
        ),
        ("policy.shares.teacher=1", "teacher.ensemble", "remove teacher.ensemble"),
    ),
    (
        recipe_tree(train={"validate_max_samples": 0, "checkpoint": {"keep_best": True}}),
        ("keep_best", "set train.validate_max_samples"),
    ),
    (recipe_tree(policy__name="dagger"), ("policy.name='dagger'", "use one of off, gkd")),
    (
        recipe_tree(teacher__mode="cached"),
        ("teacher.mode='cached'", "'cached_hidden_states'", "did you mean cached_topk?"),
    ),
    (
        recipe_tree(loss__name="alm", teacher__mode="cached_topk"),
        ("loss.name=alm", "teacher.mode=online"),
    ),
    (
        recipe_tree(loss__fused=False, teacher__mode="cached_hidden_states"),
        ("loss.fused=false", "teacher.mode=online"),
    ),
    (
        recipe_tree(loss__name="uld", teacher__ensemble=[{"model": "o"}]),
        ("teacher.ensemble", "loss.name=uld"),
    ),
    (
        recipe_tree(teacher__mode="cached_hidden_states", teacher__ensemble=[{"model": "o"}]),
        ("teacher.mode=cached_hidden_states", "teacher.ensemble"),
    ),
    (
        recipe_tree(teacher__ensemble=[{"model": "o", "weight": 0}]),
        ("teacher.ensemble.0.weight=0", "greater than"),
    ),
    (
        recipe_tree(teacher__quantization="int4"),
        ("teacher.quantization='int4'", "bnb_8bit", "bnb_4bit"),
    ),
    (
        recipe_tree(teacher__quantization="bnb_4bit"),
        ("quantization=bnb_4bit", "teacher_zero3", "set teacher.ds_config=null"),
    ),
    (
        recipe_tree(
            policy__name="seqkd",
            loss__name="sft",
            teacher={"model": "t", "ds_config": None, "quantization": "bnb_8bit"},
        ),
        ("policy.name=seqkd", "remove teacher.quantization=bnb_8bit"),
    ),
    (
        recipe_tree(
            teacher={
                "model": "t",
                "ds_config": None,
                "quantization": "bnb_8bit",
                "mode": "cached_topk",
            },
            teacher_cache__backend="vllm",
        ),
        ("teacher.quantization=bnb_8bit asks for 8", "set it to bnb_4bit"),
    ),
    (recipe_tree(teacher_cache__top_k=0), ("teacher_cache.top_k=0", "greater than")),
    (recipe_tree(teacher_cache__num_samples=0), ("teacher_cache.num_samples=0", "greater than")),
    (
        recipe_tree(loss__name="skl", teacher__mode="cached_sampled"),
        ("teacher.mode=cached_sampled", "linear", "loss.name=skl", "set loss.name=fkl"),
    ),
    (
        recipe_tree(teacher__mode="cached_topk", teacher_cache__hidden_dtype="int8"),
        ("teacher_cache.hidden_dtype=int8", "cached_topk does not cache", "set it to model"),
    ),
    (
        recipe_tree(teacher__mode="cached_hidden_states", teacher_cache__top_p=0.9),
        ("teacher_cache.top_p=0.9", "does not cache", "set it to null"),
    ),
    (
        recipe_tree(loss__name="alm", teacher__mode="cached_sampled"),
        ("loss.name=alm", "teacher.mode=online"),
    ),
]


@pytest.mark.parametrize(("tree", "words"), BAD, ids=[words[0] for _, words in BAD])
def test_a_bad_recipe_is_explained(tree: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(tree)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_base_is_valid_and_frozen() -> None:
    recipe = check_recipe(copy.deepcopy(BASE))
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def paths(tree: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a tree, as a path."""
    if not isinstance(tree, dict):
        return []
    return [
        p for key, value in tree.items() for p in [(*prefix, key), *paths(value, (*prefix, key))]
    ]


FULL = yaml.safe_load(dump_recipe(load_recipe("quickstart")))
garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from(paths(FULL)),
    value=garbage,
    action=st.sampled_from(["delete", "replace", "add"]),
    key=st.text(max_size=8),
)
def test_any_recipe_is_valid_or_a_recipe_error(
    path: tuple[str, ...], value: Any, action: str, key: str
) -> None:
    tree = copy.deepcopy(FULL)
    node = tree
    for part in path[:-1]:
        node = node[part]
    if action == "delete":
        del node[path[-1]]
    else:
        node[path[-1] if action == "replace" else key] = value
    try:
        recipe = check_recipe(tree)
    except RecipeError as error:
        assert str(error).startswith("recipe")
    else:
        assert check_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_benchmarks_must_be_names() -> None:
    with pytest.raises(RecipeError, match="recipe field evaluate.benchmarks"):
        check_recipe({**BASE, "evaluate": {"benchmarks": [["dolly"]]}})


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(BASE))
    recipe = load_recipe(
        str(file),
        [
            "train.batch_size=32",
            "curriculum.temperature=[1, 3]",
            "student.prune.drop_layers=1-2",
            "teacher.dtype=bfloat16",
        ],
    )
    assert recipe.train.batch_size == 32
    assert recipe.curriculum.temperature == (1.0, 3.0)
    assert recipe.student.prune is not None
    assert recipe.student.prune.drop_layers == "1-2"
    assert recipe.teacher is not None
    assert (recipe.teacher.model, recipe.teacher.dtype) == ("t", "bfloat16")
    assert (
        load_recipe(str(file), ["train.batch_size=32", "train.batch_size=64"]).train.batch_size
        == 64
    )


def test_an_override_changes_one_of_two_places_that_share_an_alias(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\ndata: {source: d.jsonl}\nteacher: &m {model: t}\nstudent: *m\n")
    recipe = load_recipe(str(file), ["student.model=s"])
    assert recipe.teacher is not None and (recipe.teacher.model, recipe.student.model) == ("t", "s")


@pytest.mark.parametrize(
    "mode", ["online", "cached_hidden_states", "cached_topk", "cached_sampled", "auto"]
)
def test_quantization_changes_the_fingerprints(mode: str) -> None:
    all_digests = [
        fingerprints(
            check_recipe(
                recipe_tree(
                    teacher__ds_config=None, teacher__mode=mode, teacher__quantization=quantization
                )
            )
        )
        for quantization in ("none", "bnb_8bit", "bnb_4bit")
    ]
    assert all(
        len({digests[step] for digests in all_digests}) == 3 for step in ("cache-teacher", "train")
    )
    assert len({digests["preprocess"] for digests in all_digests}) == 1


def test_adapters_by_overrides(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(BASE))
    recipe = load_recipe(
        str(file), ["student.lora.target_modules=q_proj, v_proj", "student.lora.alpha=8"]
    )
    assert recipe.student.lora is not None
    assert (
        recipe.student.lora.r,
        recipe.student.lora.alpha,
        recipe.student.lora.target_modules,
    ) == (
        16,
        8,
        ("q_proj", "v_proj"),
    )
    plain, adapted = load_recipe(str(file)), load_recipe(str(file), ["student.lora={}"])
    assert (
        plain.student.lora is None
        and adapted.student.lora is not None
        and adapted.student.lora.target_modules == ("all-linear",)
    )
    assert len({fingerprints(variant)["train"] for variant in (plain, adapted, recipe)}) == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size", ("section.field=value",)),
        ("=3", ("section.field=value",)),
        ("train..lr=3", ("section.field=value",)),
        ("train.lr=[", ("valid YAML", "quote")),
        ("name.first=x", ("name", "not a section")),
        ("train.lrr=1", ("train.lrr", "did you mean lr")),
    ],
)
def test_bad_overrides(override: str, words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(BASE))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), [override])
    for word in words:
        assert word in str(caught.value)


def test_yaml_that_grows_without_end_is_refused_at_once() -> None:
    """Seven levels of merge keys took 99 seconds, and a number of base 60 minutes."""
    levels = [f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 8)]
    start = time.monotonic()
    with pytest.raises(yaml.YAMLError, match=r"merge keys \(<<\) are not read"):
        parse_yaml("".join(["a0: &a0 {k: 1}\n", *levels]))
    sexagesimal = ":".join(["1"] * 100_000)
    assert parse_yaml(f"a: {sexagesimal}\nb: 1:30:00") == {"a": sexagesimal, "b": "1:30:00"}
    for text in (f"!!int {sexagesimal}", "!!float 1:30", "9" * 500):
        with pytest.raises(yaml.YAMLError, match="is not of the type of its tag"):
            parse_yaml(f"a: {text}")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "override",
    [
        "score.shards=99999999",
        "teacher_cache.shards=99999999",
        "train.hang_timeout_seconds=1e15",
        f"name={'x' * 101}",
    ],
)
def test_numbers_that_no_machine_can_serve_are_refused(override: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe field {override.partition('=')[0]}="):
        load_recipe("quickstart", [override])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1\nb: 2\n", ("line", "valid YAML")),
        (b"", ("no sections",)),
        (b"- 1\n", ("no sections",)),
        (b"\xff\xfe\x00", ("r.yaml",)),
    ],
)
def test_bad_files(content: bytes, words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="quickstart"):
        load_recipe("quikstart")


def test_runtime_only_fields_are_not_semantic() -> None:
    train = TrainConfig(batch_size=8, micro_batch_size=2)
    changed = TrainConfig(batch_size=8, micro_batch_size=4, checkpoint={"every_n_steps": 7})  # type: ignore[arg-type]
    assert semantic_fields(train) == semantic_fields(changed)
    assert semantic_fields(train) != semantic_fields(
        TrainConfig(batch_size=8, micro_batch_size=2, lr=1.0)
    )
    recipe = Recipe.model_validate(BASE)
    assert "hardware" not in semantic_fields(recipe)
    assert semantic_fields(recipe)["launch"] == {}


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_written_and_read_again_has_the_same_fingerprints(
    path: Path, tmp_path: Path
) -> None:
    """A default of 60 that is read back as 60.0 would invalidate a finished run."""
    recipe = load_recipe(str(path))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert fingerprints(load_recipe(str(tmp_path / "recipe.yaml"))) == fingerprints(recipe)
