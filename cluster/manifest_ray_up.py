"""A cluster for `ray up` on EC2 or Compute Engine: a head on demand, workers on spot machines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.manifests import Nodes

_USER = "ubuntu"
_TOKEN = ".ray/auth_token"
"""Where Ray looks for it, below the home."""
_DISK_GB = 200
_IDLE_MINUTES = 30


@dataclass(frozen=True, kw_only=True)
class RayUp:
    """What a cluster file is made of."""

    name: str
    cloud: Literal["aws", "gcp"]
    region: str
    zone: str
    project: str | None
    """GCP's."""
    image: str | None
    """AMI, or GCP source image; Ray knows an AMI of its own for most regions."""
    identity: str | None
    """Instance profile, or GCP service account, that may read and write the bucket."""
    head_type: str
    worker_type: str
    nodes: Nodes
    spot: bool
    drain_s: int
    install: str | Path
    """A pip requirement, or a wheel of this machine, which goes to the nodes as the token does."""
    environment: Mapping[str, str]

    def manifest(self) -> dict[str, Any]:
        """The document for `ray up`."""
        install, mounts = self._install()
        workers = {"CPU": self.nodes.num_cpus, **({"GPU": self.nodes.num_gpus} if self.nodes.num_gpus else {})}
        return {
            "cluster_name": self.name,
            "max_workers": self.nodes.most,
            "idle_timeout_minutes": _IDLE_MINUTES,
            "provider": self._provider(),
            "auth": {"ssh_user": _USER},
            "available_node_types": {
                # No worker on the head: it is not a GPU machine.
                "head": {"resources": {"CPU": 0}, "node_config": self._node(self.head_type, spot=False)},
                "worker": {
                    "min_workers": self.nodes.most,
                    "max_workers": self.nodes.most,
                    "resources": workers,
                    "node_config": self._node(self.worker_type, spot=self.spot),
                },
            },
            "head_node_type": "head",
            # The token travels over ssh; it is not in this file.
            "file_mounts": {f"/home/{_USER}/{_TOKEN}": f"~/{_TOKEN}", **mounts},
            "setup_commands": [f"pip install --upgrade {shlex.quote(install)}"],
            "head_start_ray_commands": ["ray stop", self._start(head=True)],
            "worker_start_ray_commands": ["ray stop", self._start(head=False)],
        }

    def _install(self) -> tuple[str, dict[str, str]]:
        """What pip is told, and the file that it needs for that: path on the nodes -> path here."""
        if isinstance(self.install, str):
            return self.install, {}
        there = f"/home/{_USER}/{self.install.name}"
        return f"{there}[gpu]", {there: str(self.install)}

    def _provider(self) -> dict[str, Any]:
        provider = {"type": self.cloud, "region": self.region, "availability_zone": self.zone}
        if self.project is not None:
            provider["project_id"] = self.project
        # A spot machine that was taken cannot be started again.
        return provider if self.cloud == "gcp" else provider | {"cache_stopped_nodes": False}

    def _node(self, machine: str, *, spot: bool) -> dict[str, Any]:
        return self._ec2(machine, spot) if self.cloud == "aws" else self._compute_engine(machine, spot)

    def _ec2(self, machine: str, spot: bool) -> dict[str, Any]:
        disk = {"VolumeSize": _DISK_GB, "VolumeType": "gp3"}
        node: dict[str, Any] = {
            "InstanceType": machine,
            "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
            # IMDSv2 only; two hops reach containers, which listen for the notice too.
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        }
        if self.image is not None:
            node["ImageId"] = self.image
        if self.identity is not None:
            node["IamInstanceProfile"] = {"Name": self.identity}
        if spot:
            node["InstanceMarketOptions"] = {"MarketType": "spot"}
        return node

    def _compute_engine(self, machine: str, spot: bool) -> dict[str, Any]:
        disk = {"diskSizeGb": _DISK_GB, "sourceImage": self.image}
        node: dict[str, Any] = {
            "machineType": machine,
            "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
            "metadata": {"items": [{"key": "install-nvidia-driver", "value": "True"}]},
        }
        if self.identity is not None:
            scope = "https://www.googleapis.com/auth/cloud-platform"
            node["serviceAccounts"] = [{"email": self.identity, "scopes": [scope]}]
        # GPUs cannot move to another host.
        scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE"}
        node["scheduling"] = [scheduling | ({"preemptible": True} if spot else {})]
        return node

    def _start(self, *, head: bool) -> str:
        variables = {
            "RAY_AUTH_MODE": "token",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(self.drain_s),
            **self.environment,
        }
        exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        # The dashboard is for `ray dashboard`, which tunnels to it.
        where = "--head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
        return f"ulimit -n 65536; {exports} ray start {where if head else '--address=$RAY_HEAD_IP:6379'}"
