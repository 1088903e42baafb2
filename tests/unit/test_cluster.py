"""The files of examples/cluster: their syntax, and a dry run of what torchrun and the program would be given."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.schema import TopologyConfig

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
# The variables that SLURM, Kubernetes and a user set on the second of two machines.
SET = {
    "CHECKPOINT": "/data/Cosmos3-Super",
    **{"NODE_RANK": "1", "MASTER_ADDR": "host0", "JOB_COMPLETION_INDEX": "1"},
    **{"SLURM_JOB_NODELIST": "host[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"},
}
STAND_INS = {
    "srun": 'exec "$@"',
    "scontrol": "printf 'host0\\nhost1\\n'",
    "torchrun": "printf '%s\\n' \"$@\"",
}


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine whose programs are stand-ins; torchrun prints its arguments, one a line."""
    for name, line in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **SET}


def manifests(name: str) -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((CLUSTER / name).read_text())}


def container(name: str) -> dict[str, Any]:
    """The one container of the Job in a manifest."""
    (found,) = manifests(name)["Job"]["spec"]["template"]["spec"]["containers"]
    return found


def topology(arguments: list[str]) -> TopologyConfig:
    """The topology of a run with `arguments`, except those that need the cluster or belong to Hydra."""
    assert "model.path=/data/Cosmos3-Super" in arguments
    return compose([each for each in arguments if not each.startswith(("hydra.", "model.path="))]).topology


def commands() -> dict[str, list[str]]:
    pod = container("two_nodes.yaml")
    prompt = "task.prompt='a red kite'"
    return {
        "torchrun.sh": ["bash", str(CLUSTER / "torchrun.sh"), prompt],
        "run.sbatch": ["bash", str(CLUSTER / "run.sbatch"), prompt],
        "two_nodes.yaml": [*pod["command"], *pod["args"]],
    }


@pytest.mark.parametrize("name", list(commands()))
def test_torchrun_is_given_the_ranks_that_the_settings_ask_for(name: str, machine: dict[str, str]) -> None:
    done = subprocess.run(commands()[name], env=machine, capture_output=True, text=True, check=True)
    given = parse_args(done.stdout.splitlines())
    assert given.module and given.training_script == "cosmos3_pipeline"
    asked = topology(given.training_script_args)
    assert (int(given.nnodes), int(given.nproc_per_node)) == (asked.nodes, asked.ranks_per_node) == (2, 8)
    if name == "run.sbatch":
        assert given.rdzv_endpoint == "host0:29500" and given.rdzv_backend == "c10d"
        text = (CLUSTER / name).read_text()
        assert all(f"#SBATCH --{line}\n" in text for line in ("nodes=2", "gpus-per-node=8", "ntasks-per-node=1"))
    else:
        assert given.node_rank == 1 and given.master_addr in ("host0", "cosmos3-0.cosmos3")


def test_the_job_on_one_machine_asks_for_the_gpus_of_its_topology() -> None:
    pod = container("one_node.yaml")
    asked = topology(pod["args"])
    assert pod["command"] == ["cosmos3"]
    assert (asked.nodes, asked.ranks_per_node) == (1, pod["resources"]["limits"]["nvidia.com/gpu"])


def test_pods_of_the_indexed_job_find_each_other() -> None:
    found = manifests("two_nodes.yaml")
    service, job = found["Service"], found["Job"]
    name, spec = service["metadata"]["name"], job["spec"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["template"]["spec"]["subdomain"] == name
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    (line,) = container("two_nodes.yaml")["args"]
    assert f"--master-addr={job['metadata']['name']}-0.{name}" in shlex.split(line)
    assert container("two_nodes.yaml")["resources"]["limits"]["nvidia.com/gpu"] == 8
