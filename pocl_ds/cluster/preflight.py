"""The check before a job's first command: does every node have what the profile promises, and can
the nodes reach each other?

It runs over all ranks of the job. Ranks of an unfit node exit with EXIT_UNFIT_NODE, so that the job
can continue without this node; a fault that all nodes share ends the job with one sentence.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from socket import AF_INET, AF_INET6
from statistics import median_low
from typing import Any

import psutil
import torch
import torch.distributed as dist

from pocl_ds.cluster import machine_checks
from pocl_ds.errors import EXIT_HANG, EXIT_UNFIT_NODE, PoclError, ResourceError
from pocl_ds.runtime import distributed
from pocl_ds.runtime.logs import setup_logging
from pocl_ds.runtime.process_exit import install_signal_handlers, node_name, record_exit
from pocl_ds.workflow.files import file_digest, write_json
from pocl_ds.workflow.manifest import package_versions
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

MAX_CLOCK_DIFFERENCE = 5.0  # seconds between two nodes
# Size of the timed all-reduce in MiB; on GPUs it takes some milliseconds.
ALL_REDUCE_MIB = {"cpu": 16, "cuda": 512}
ALL_REDUCE_ROUNDS = 3


def inspect_node(run: RunDirectory, spec: dict[str, Any], token: str) -> dict[str, Any]:
    """This rank's report on its node, which every rank gathers.

    `faults` are sentences; `node_fault` is true if one of them concerns this node alone, even if
    all nodes report it.

    token: name of a file that rank 0 has just written to the run directory.
    """
    clock = time.time()  # read before anything that takes longer on one node than on another
    folder = run.cluster / "preflight"
    training = {"train": run.train, "baseline": run.baseline}.get(spec["name"])
    needed = 0
    if training:
        needed = machine_checks.checkpoint_bytes(
            run.path, training, keep_last=spec["keep_last"], lora=spec["lora"]
        )
    gpus = machine_checks.check_gpus(promised_gpus(spec))
    findings = [
        gpus,
        machine_checks.check_run_directory(run.path, needed),
        machine_checks.check_limits(),
        machine_checks.check_scratch(),
    ]
    faults = [finding.message for finding in findings if finding.state == machine_checks.FAIL]

    # A network file system may show the file of another node late.
    for _ in range(50):
        if (folder / token).is_file():
            break
        time.sleep(0.1)
    else:
        faults.append(
            f"{run.path} is another folder here than on the first node: mount it on every node"
        )
    recipe = file_digest(run.recipe)["sha256"] if run.recipe.is_file() else "missing"
    return {
        "node": node_name(),
        "faults": faults,
        "node_fault": gpus.state == machine_checks.FAIL,
        "clock": clock,
        "recipe": recipe,
        "versions": package_versions(),
        "notes": [f.message for f in findings if f.state == machine_checks.WARN],
    }


def promised_gpus(spec: dict[str, Any]) -> int:
    """GPUs that this rank must see: its own if launch/train.sh restricts it, else its node's."""
    return int(os.environ.get("POCL_GPUS", spec["gpus_per_node"]))


def check_device(gpus: int) -> None:
    """Raise ResourceError if this rank's GPU is missing or cannot add two numbers: its memory is
    damaged, or another process holds it exclusively.

    gpus: how many are promised.
    """
    try:
        device = distributed.device()
        torch.ones(1, device=device).add_(1).item()
    except PoclError:
        raise
    except RuntimeError as error:
        number = os.environ.get("LOCAL_RANK", "0")
        raise ResourceError(
            f"its GPU {number} cannot compute ({str(error).splitlines()[0]}): exclude this node"
        ) from error
    if device.type == "cpu":
        raise ResourceError(
            f"no GPU is visible, and {gpus} are promised ({machine_checks.cuda_error()})"
        )


def check_interfaces() -> None:
    """Raise ResourceError if this node lacks the profile's network interface. Otherwise the
    other nodes would wait for it and look faulty.
    """
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    with_address = {
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.family in (AF_INET, AF_INET6) for address in addresses)
    }
    if names and not with_address & set(names):
        raise ResourceError(
            f"it has no network interface {' or '.join(names)} with an address, which the profile "
            f"names; it has {', '.join(sorted(with_address))}"
        )


def differing_nodes(reports: list[dict[str, Any]]) -> dict[str, str]:
    """Nodes whose recipe, packages or clock differ from those of most ranks, and how."""
    majority = Counter(
        json.dumps([report["recipe"], report["versions"]], sort_keys=True) for report in reports
    ).most_common(1)[0][0]
    recipe, packages = json.loads(majority)
    clock = median_low(report["clock"] for report in reports)
    differing: dict[str, str] = {}
    for report in reports:
        versions = [
            f"{name} {report['versions'].get(name)} against {version}"
            for name, version in packages.items()
            if report["versions"].get(name) != version
        ]
        difference = report["clock"] - clock
        if report["recipe"] != recipe:
            differing[report["node"]] = "it reads another recipe than the others"
        elif versions:
            differing[report["node"]] = f"its packages differ: {', '.join(versions)}"
        elif abs(difference) > MAX_CLOCK_DIFFERENCE:
            differing[report["node"]] = (
                f"its clock is {difference:+.0f} s off: have it synchronized (NTP)"
            )
    return differing


def all_reduce_bandwidth() -> float:
    """Gigabytes a second that one rank sends in a ring all-reduce, the best of some rounds."""
    ranks, device = distributed.world_size(), distributed.device()
    if ranks == 1:
        return 0.0
    values = torch.zeros(ALL_REDUCE_MIB[device.type] << 18, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(ALL_REDUCE_ROUNDS):
        distributed.barrier()
        start = time.monotonic()
        distributed.all_sum(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - start)
    return 2 * (ranks - 1) / ranks * values.numel() * 4 / best / 1e9


def preflight(run: RunDirectory, spec: dict[str, Any]) -> tuple[int, str]:
    """Check every node. Returns the exit code of this rank, and its sentence."""
    start = time.monotonic()

    # Check this rank's GPU. A wrong build of torch is wrong on every node, so no node is excluded.
    if gpus := promised_gpus(spec):
        if fault := machine_checks.wrong_build(spec["gpu_vendor"]):
            return 2, fault
        check_device(gpus)

    # Connect the ranks. With blocking wait a stalled NCCL raises, as gloo does; otherwise torch's
    # watchdog would abort the process.
    if distributed.world_size() > 1:
        check_interfaces()
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        dist.init_process_group(
            "nccl" if distributed.device().type == "cuda" else "gloo",
            timeout=timedelta(seconds=spec["preflight_seconds"]),
        )

    # Inspect every node. All must see the file that rank 0 writes.
    token = distributed.broadcast_object(
        f"{os.environ.get('SLURM_JOB_ID', 'here')}-{time.time_ns()}"
    )
    if distributed.rank() == 0:
        write_json(run.cluster / "preflight" / token, {})
    distributed.barrier()
    reports = distributed.gather_objects(inspect_node(run, spec, token))
    distributed.barrier()
    if distributed.rank() == 0:
        (run.cluster / "preflight" / token).unlink()

    # Find nodes at fault, or else nodes that differ from the others.
    faults = {report["node"]: "; ".join(report["faults"]) for report in reports if report["faults"]}
    faults = faults or differing_nodes(reports)
    nodes = sorted({report["node"] for report in reports})
    if not faults:
        _log_success(reports, len(nodes), start)
        return 0, ""
    sentence = "; ".join(f"{node}: {fault}" for node, fault in faults.items())
    node_fault = len(nodes) == 1 and any(report["node_fault"] for report in reports)
    if set(faults) == set(nodes) and not node_fault:
        return 2, sentence
    # Ranks of fit nodes exit with 0: on any other code srun would kill the faulty ones too early.
    return (EXIT_UNFIT_NODE, sentence) if node_name() in faults else (0, "")


def _log_success(reports: list[dict[str, Any]], nodes: int, start: float) -> None:
    bandwidth = all_reduce_bandwidth()
    notes = sorted({note for report in reports for note in report["notes"]})
    log.info(
        "preflight: %d ranks on %d nodes agree%s; %.1f s%s",
        len(reports),
        nodes,
        f", an all-reduce moves {bandwidth:.2f} GB/s" if bandwidth else "",
        time.monotonic() - start,
        "".join(f"; {note}" for note in notes),
    )


def main() -> int:
    """The command line that launch/train.sh starts: NAME --run-dir RUN."""
    install_signal_handlers()
    name, run = sys.argv[1], RunDirectory(Path(sys.argv[3]))
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    spec = json.loads((run.cluster / "jobs" / f"{name}.json").read_text())
    start = time.monotonic()
    try:
        code, sentence = preflight(run, spec)
    except PoclError as error:  # this rank has no device, or cannot write
        code, sentence = EXIT_UNFIT_NODE, f"{node_name()}: {error}"
    except (RuntimeError, ValueError) as error:  # torch could not connect the ranks
        # A rank that waited in vain is not at fault; one that failed at once may be.
        waited = time.monotonic() - start > 0.8 * spec["preflight_seconds"]
        code = EXIT_HANG if waited else 1
        sentence = (
            f"the ranks do not reach each other ({str(error).splitlines()[0]}): check the "
            "profile's network.interface"
        )
    if sentence:
        log.error("preflight: %s", sentence)
    record_exit(code, f"preflight: {sentence}" if sentence else "")
    return code


if __name__ == "__main__":
    sys.exit(main())
