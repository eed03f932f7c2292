"""The seconds before a job's first step: is every node what the profile promised, and do they reach
each other?

Runs as a step of the job over all its ranks. A node that is at fault ends its ranks with UNFIT, so
that the job can go on without it; what is wrong everywhere is one sentence, and the job's end.
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

from pocl_ds.cluster import checks
from pocl_ds.errors import HANG, UNFIT, PoclError, ResourceError
from pocl_ds.runtime import distributed
from pocl_ds.runtime.process_exit import leave_when_asked, leave_word, node_name
from pocl_ds.runtime.tracking import setup_logging
from pocl_ds.workflow.files import file_digest, write_json
from pocl_ds.workflow.manifest import package_versions
from pocl_ds.workflow.run_dir import RunDirectory

log = logging.getLogger("pocl_ds")

CLOCKS = 5.0  # seconds that nodes may differ by
MEBIBYTES = {
    "cpu": 16,
    "cuda": 512,
}  # of the all-reduce that is timed: on a GPU some milliseconds, as its end is seen within one
ROUNDS = 3


def look(run: RunDirectory, spec: dict[str, Any], token: str) -> dict[str, Any]:
    """What this rank sees of its node. `faults`: sentences; `own`: one of them is this node's
    alone, whatever the others see.
    """
    clock = time.time()  # before anything that takes longer on one node than on another
    shared = run.cluster / "preflight"
    training = {"train": run.train, "baseline": run.baseline}.get(spec["name"])
    needed = (
        checks.checkpoint_bytes(run.path, training, keep=spec["keep"], adapters=spec["adapters"])
        if training
        else 0
    )
    device = checks.devices(promised(spec))
    findings = [device, checks.folder(run.path, needed), checks.limits(), checks.scratch()]
    faults = [finding.said for finding in findings if finding.state == checks.FAIL]
    for _ in range(50):  # a network file system may show another node's file late
        if (shared / token).is_file():
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
        "own": device.state == checks.FAIL,
        "clock": clock,
        "recipe": recipe,
        "versions": package_versions(),
        "notes": [finding.said for finding in findings if finding.state == checks.WARN],
    }


def promised(spec: dict[str, Any]) -> int:
    """GPUs that this rank must see: its node's, or as launch/train.sh knows, the one that is its
    own.
    """
    return int(os.environ.get("POCL_GPUS", spec["gpus_per_node"]))


def check_device(gpus: int) -> None:
    """Raise ResourceError where this rank's GPU is not there or cannot add two numbers, as one
    whose memory is damaged or that somebody else has taken for himself alone.

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
            f"its GPU {number} cannot compute ({str(error).splitlines()[0]}): leave this node out"
        ) from error
    if device.type == "cpu":
        raise ResourceError(f"no GPU is visible, where {gpus} are promised ({checks.why_no_gpu()})")


def check_ways() -> None:
    """Raise ResourceError where this node cannot meet the others: they would wait for it, and look
    as if they were at fault.
    """
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    here = psutil.net_if_addrs()
    able = {
        name
        for name, addresses in here.items()
        if any(one.family in (AF_INET, AF_INET6) for one in addresses)
    }
    if names and not able & set(names):
        raise ResourceError(
            f"it has no network interface {' or '.join(names)} with an address, which the profile "
            f"names; it has "
            f"{', '.join(sorted(able))}"
        )


def differences(found: list[dict[str, Any]]) -> dict[str, str]:
    """Nodes whose recipe, packages or clock are not those of most ranks, each with how."""
    usual = Counter(
        json.dumps([look["recipe"], look["versions"]], sort_keys=True) for look in found
    ).most_common(1)[0][0]
    recipe, packages = json.loads(usual)
    clock, odd = median_low(look["clock"] for look in found), {}
    for look in found:
        versions = [
            f"{name} {look['versions'].get(name)} against {version}"
            for name, version in packages.items()
            if look["versions"].get(name) != version
        ]
        if look["recipe"] != recipe:
            odd[look["node"]] = "it sees another recipe than the others"
        elif versions:
            odd[look["node"]] = f"its packages differ: {', '.join(versions)}"
        elif abs(look["clock"] - clock) > CLOCKS:
            odd[look["node"]] = (
                f"its clock is {look['clock'] - clock:+.0f} s off: have it set (NTP)"
            )
    return odd


def bandwidth() -> float:
    """Gigabytes a second that one rank sends in a ring all-reduce, the best of a few."""
    ranks, device = distributed.world_size(), distributed.device()
    if ranks == 1:
        return 0.0
    values = torch.zeros(MEBIBYTES[device.type] << 18, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        distributed.barrier()
        start = time.monotonic()
        distributed.all_sum(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - start)
    return 2 * (ranks - 1) / ranks * values.numel() * 4 / best / 1e9


def preflight(run: RunDirectory, spec: dict[str, Any]) -> tuple[int, str]:
    """Look at every node. Returns the exit code of this rank, and its sentence."""
    start = time.monotonic()
    if gpus := promised(spec):
        if not torch.backends.cuda.is_built():  # wrong on every node: none is to be left out for it
            return 2, f"GPUs are promised, and {checks.CPU_BUILD}"
        check_device(gpus)
    if distributed.world_size() > 1:
        check_ways()
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = (
            "1"  # what stalls raises, as on gloo: else torch's watchdog aborts us
        )
        dist.init_process_group(
            "nccl" if distributed.device().type == "cuda" else "gloo",
            timeout=timedelta(seconds=spec["patience"]),
        )
    token = distributed.from_rank_zero(f"{os.environ.get('SLURM_JOB_ID', 'here')}-{time.time_ns()}")
    if distributed.rank() == 0:
        write_json(run.cluster / "preflight" / token, {})
    distributed.barrier()
    found = distributed.gather_objects(look(run, spec, token))
    distributed.barrier()
    if distributed.rank() == 0:
        (run.cluster / "preflight" / token).unlink()
    faults = {look["node"]: "; ".join(look["faults"]) for look in found if look["faults"]}
    faults = faults or differences(found)
    nodes = sorted({look["node"] for look in found})
    if not faults:
        speed = bandwidth()
        notes = sorted({note for look in found for note in look["notes"]})
        log.info(
            "preflight: %d ranks on %d nodes agree%s; %.1f s%s",
            len(found),
            len(nodes),
            f", an all-reduce moves {speed:.2f} GB/s" if speed else "",
            time.monotonic() - start,
            "".join(f"; {note}" for note in notes),
        )
        return 0, ""
    sentence = "; ".join(f"{node}: {fault}" for node, fault in faults.items())
    if set(faults) == set(nodes) and not (len(nodes) == 1 and any(look["own"] for look in found)):
        return 2, sentence
    # With any other code a fit node's rank would make srun end those that have a fault to tell.
    return (UNFIT, sentence) if node_name() in faults else (0, "")


def main() -> int:
    """The command line that launch/train.sh starts: NAME --run-dir RUN."""
    leave_when_asked()
    name, run = sys.argv[1], RunDirectory(Path(sys.argv[3]))
    setup_logging(distributed.rank(), world_size=distributed.world_size())
    spec = json.loads((run.cluster / "jobs" / f"{name}.json").read_text())
    start = time.monotonic()
    try:
        code, sentence = preflight(run, spec)
    except PoclError as error:  # a rank without a device of its own, or that cannot write
        code, sentence = UNFIT, f"{node_name()}: {error}"
    except (RuntimeError, ValueError) as error:  # torch could not bring the ranks together
        # Who waited in vain has others to blame; who failed at once may be at fault himself, or the
        # profile.
        code = HANG if time.monotonic() - start > 0.8 * spec["patience"] else 1
        sentence = f"the ranks do not reach each other ({str(error).splitlines()[0]}): check the profile's interface"
    if sentence:
        log.error("preflight: %s", sentence)
    leave_word(code, f"preflight: {sentence}" if sentence else "")
    return code


if __name__ == "__main__":
    sys.exit(main())
