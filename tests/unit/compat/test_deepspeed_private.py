"""What `compat/deepspeed_private.py` assumes of DeepSpeed. A failure here means that upstream has
changed: adapt that file.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
from torch import nn

from pocl_ds.compat import deepspeed_private


def test_full_shape_is_that_before_partitioning() -> None:
    parameter = nn.Parameter(torch.empty(0))
    assert deepspeed_private.full_shape(parameter) == (0,)
    parameter.ds_shape = torch.Size([3, 4])
    assert deepspeed_private.full_shape(parameter) == (3, 4)
    assert "param.ds_shape = param.shape" in inspect.getsource(partition_parameters)


def test_zero3_reduces_through_a_function_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    call = "reduce_scatter_coalesced(full_grads_for_rank, process_group)"
    assert call in inspect.getsource(stage3.DeepSpeedZeroOptimizer_Stage3)
    monkeypatch.setattr(stage3, "reduce_scatter_coalesced", reduce_scatter_coalesced)
    deepspeed_private.skip_reduction_of_single_rank()
    gradient = torch.arange(6.0).view(2, 3)
    (reduced,) = stage3.reduce_scatter_coalesced([gradient], None)
    assert torch.equal(reduced, gradient.flatten())


def test_the_recovery_script_is_copied_by_a_method() -> None:
    assert "self._copy_recovery_script(save_path)" in inspect.getsource(engine_module)
    engine = SimpleNamespace(_copy_recovery_script=DeepSpeedEngine._copy_recovery_script)
    deepspeed_private.disable_recovery_script(engine)
    engine._copy_recovery_script("folder")


def test_checkpoint_files_go_through_a_replaceable_method() -> None:
    class Writer:
        def save(self, state_dict: Any, path: str) -> None:
            written.append((state_dict, path))

    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    assert [*inspect.signature(CheckpointEngine.save).parameters] == ["self", "state_dict", "path"]
    assert "self.checkpoint_engine.save(" in inspect.getsource(engine_module)
    written: list[Any] = []
    collected: list[Any] = []
    engine = SimpleNamespace(checkpoint_engine=Writer())

    def collect(state_dict: Any, path: str) -> None:
        collected.append((state_dict, path))

    with deepspeed_private.intercept_checkpoint_files(engine, collect) as write_file:
        engine.checkpoint_engine.save(state_dict=1, path="a")
        write_file(2, "b")
    engine.checkpoint_engine.save(3, "c")
    assert collected == [(1, "a")] and written == [(2, "b"), (3, "c")]


def test_a_running_engine_can_load_a_universal_checkpoint() -> None:
    engine: Any = SimpleNamespace(_config=SimpleNamespace(load_universal_checkpoint=False))
    with deepspeed_private.universal_checkpoint(engine, enabled=True):
        assert DeepSpeedEngine.load_universal_checkpoint(engine)
    assert not DeepSpeedEngine.load_universal_checkpoint(engine)


def test_the_conversion_gets_every_argument_of_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["main", "--input_folder", "a", "--output_folder", "b"])
    known = vars(ds_to_universal.parse_arguments())
    arguments: list[Any] = []
    monkeypatch.setattr(ds_to_universal, "main", arguments.append)
    deepspeed_private.convert_to_universal(tmp_path / "a", tmp_path / "b", workers=3)
    assert vars(arguments[0]).keys() == known.keys()
    assert {name: type(value) for name, value in vars(arguments[0]).items()} == {
        name: type(value) for name, value in known.items()
    }


def test_a_universal_load_still_needs_its_repair() -> None:
    """It gives every parameter group the values of the first one, and all states one step
    counter.
    """
    source = inspect.getsource(
        stage3.DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3
    )
    assert '["param_groups"][0].items()' in source
    assert "['step'] = state_step" in source


def test_repaired_states_count_their_steps_where_the_parameter_is() -> None:
    """A GPU's fused Adam reads the counter there; `meta` takes its place. Each state has
    its own counter.
    """
    shared = torch.tensor(3.0)
    states: dict[Any, Any] = {
        torch.empty(2, device=device): {"step": shared} for device in ("meta", "cpu", "cpu")
    }
    groups = [{"weight_decay": 0.1}, {"weight_decay": 0.1}]
    optimizer = SimpleNamespace(param_groups=groups, optimizer=SimpleNamespace(state=states))
    deepspeed_private.repair_universal_load(SimpleNamespace(optimizer=optimizer), [0.1, 0.0])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(state["step"].device == parameter.device for parameter, state in states.items())
    steps = [state["step"] for state in states.values() if state["step"].device.type == "cpu"]
    addresses = {step.data_ptr() for step in (shared, *steps)}
    assert [float(step) for step in steps] == [3.0, 3.0] and len(addresses) == 3


@pytest.mark.parametrize("module", [stage3, stage_1_and_2])
def test_the_torch_optimizer_is_an_attribute_of_the_zero_optimizer(module: Any) -> None:
    assert "self.optimizer = init_optimizer" in inspect.getsource(module)
    inner = object()
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))
    plain = SimpleNamespace(optimizer=inner)
    assert deepspeed_private.base_optimizer(wrapped) is inner
    assert deepspeed_private.base_optimizer(plain) is inner


def test_checkpoints_hold_these_classes() -> None:
    loss_scaler, stages, address = deepspeed_private.checkpoint_classes()
    assert stages is deepspeed_private.zero_stage_enum() and issubclass(stages, Enum)
    assert stages(3).name == "weights"
    assert (loss_scaler.__name__, address.__name__) == ("LossScaler", "fragment_address")


def test_the_shared_memory_operator_is_looked_up_in_a_dictionary() -> None:
    comm_torch = importlib.import_module("deepspeed.comm.torch")
    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
    assert "__compatible_ops__.get(builder.NAME" in inspect.getsource(comm_torch)
    deepspeed_private.disable_shared_memory_collectives()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_zero_init_calls_a_replaceable_function_for_float32_parameters() -> None:
    assert "= keep_in_fp32_pattern(module," in inspect.getsource(partition_parameters)
    original = partition_parameters.keep_in_fp32_pattern
    with deepspeed_private.keep_rotary_frequencies_in_float32():
        for setting in ([], ["norm"]):
            pattern = partition_parameters.keep_in_fp32_pattern(
                nn.Linear(1, 1), setting, torch.bfloat16
            )
            assert pattern.search("model.rotary_emb.inv_freq")
            assert bool(pattern.search("model.norm.weight")) == bool(setting)
    assert partition_parameters.keep_in_fp32_pattern is original


def test_zero3_lists_the_modules_with_its_hooks() -> None:
    from deepspeed.runtime.zero import parameter_offload

    setup = inspect.getsource(parameter_offload.DeepSpeedZeRoOffload.setup_zero_stage3_hooks)
    assert "FWD_MODULE_STACK.append(self.module)" in setup
    module, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    before = list(parameter_offload.FWD_MODULE_STACK)
    parameter_offload.FWD_MODULE_STACK += [module, other]
    deepspeed_private.forget_module(module)
    deepspeed_private.forget_module(module)
    assert parameter_offload.FWD_MODULE_STACK[len(before) :] == [other]
    deepspeed_private.forget_module(other)
