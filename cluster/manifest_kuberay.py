"""A job as a KubeRay RayJob, `ray.io/v1`: a head that stays, workers on spot nodes, retries on a new cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from cluster.manifests import Cloud, Nodes

_OBJECT_STORE_BYTES = 2**30
_SHM = "4Gi"
"""/dev/shm of every pod: Ray's object store and nccl's buffers. Kubernetes gives 64 MiB."""
_GRACE_S = 20
"""From the end of the drain to SIGKILL, in which Ray ends its processes."""
_TTL_S = 600
"""The finished cluster is kept so long, to look at."""
_SUBMIT_TRIES = 3
_REDIS_KEY = "password"

# key of a node's label -> the value that spot nodes have. EKS's node groups and Karpenter label in ways of their own.
_SPOT_LABELS: dict[Cloud, dict[str, str]] = {
    "aws": {"eks.amazonaws.com/capacityType": "SPOT", "karpenter.sh/capacity-type": "spot"},
    "gcp": {"cloud.google.com/gke-spot": "true"},
    "azure": {"kubernetes.azure.com/scalesetpriority": "spot"},
}
# What the cloud itself taints its spot nodes with. EKS and Karpenter do not.
_SPOT_TAINTS: dict[Cloud, dict[str, str]] = {
    "aws": {},
    "gcp": {"cloud.google.com/gke-spot": "true"},
    "azure": {"kubernetes.azure.com/scalesetpriority": "spot"},
}


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What a RayJob is made of."""

    name: str
    namespace: str
    entrypoint: str
    labels: Mapping[str, str]
    """What is told of the job beside its command."""
    image: str
    nodes: Nodes
    cloud: Cloud
    spot: bool
    """Workers on spot nodes; the head never is."""
    drain_s: int
    backoff_limit: int
    service_account: str
    memory_per_worker: str
    head_cpus: int
    head_memory: str
    environment: Mapping[str, str]
    secrets: Sequence[str]
    """Kubernetes Secrets whose keys become variables."""
    node_selector: Mapping[str, str]
    """Of the workers."""
    tolerations: Mapping[str, str]
    """Of the workers, beside those for spot and GPUs."""
    redis_address: str | None
    redis_secret: str | None

    def manifest(self) -> dict[str, Any]:
        """The document for `kubectl apply`."""
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {
                "entrypoint": self.entrypoint,
                "metadata": dict(self.labels),
                "submissionMode": "K8sJobMode",
                "submitterConfig": {"backoffLimit": _SUBMIT_TRIES},
                # Each retry is a new cluster and the same command: the run goes on.
                "backoffLimit": self.backoff_limit,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": _TTL_S,
                "rayClusterSpec": self._cluster(),
            },
        }

    def _cluster(self) -> dict[str, Any]:
        cluster: dict[str, Any] = {
            "rayVersion": metadata.version("ray"),
            "authOptions": {"mode": "token"},
            # The driver goes on with the workers that there are, so all are asked for, and none is taken away.
            "enableInTreeAutoscaling": False,
        }
        if self.redis_address is not None:
            cluster["gcsFaultToleranceOptions"] = self._fault_tolerance(self.redis_address)
        return cluster | {"headGroupSpec": self._head(), "workerGroupSpecs": [self._workers()]}

    def _fault_tolerance(self, address: str) -> dict[str, Any]:
        options: dict[str, Any] = {"redisAddress": address}
        if self.redis_secret is not None:
            reference = {"name": self.redis_secret, "key": _REDIS_KEY}
            options["redisPassword"] = {"valueFrom": {"secretKeyRef": reference}}
        return options

    def _head(self) -> dict[str, Any]:
        resources = {"cpu": str(self.head_cpus), "memory": self.head_memory}
        ports = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}
        container = self._container("ray-head", resources) | {
            "ports": [{"name": name, "containerPort": port} for name, port in ports.items()]
        }
        # No worker on the head: it is not a GPU node. The dashboard asks for the token.
        parameters = {"num-cpus": "0", "dashboard-host": "0.0.0.0", "object-store-memory": str(_OBJECT_STORE_BYTES)}
        pod = self._pod(container) | {"affinity": self._affinity(spot=False)}
        return {"serviceType": "ClusterIP", "rayStartParams": parameters, "template": self._template(pod)}

    def _workers(self) -> dict[str, Any]:
        nodes = self.nodes
        amount, unit = _split(self.memory_per_worker)
        resources = {"cpu": str(nodes.num_cpus), "memory": f"{amount * nodes.workers:g}{unit}"}
        tolerations = [_toleration(key, value) for key, value in self.tolerations.items()]
        if nodes.num_gpus:
            resources["nvidia.com/gpu"] = str(nodes.num_gpus)
            tolerations.append(_toleration("nvidia.com/gpu", ""))
        if self.spot:
            tolerations += [_toleration(key, value) for key, value in _SPOT_TAINTS[self.cloud].items()]
        pod = self._pod(self._container("ray-worker", resources)) | {"affinity": self._affinity(spot=self.spot)}
        if self.node_selector:
            pod["nodeSelector"] = dict(self.node_selector)
        if tolerations:
            pod["tolerations"] = tolerations
        return {
            "groupName": "workers",
            "replicas": nodes.most,
            "minReplicas": nodes.least,
            "maxReplicas": nodes.most,
            "rayStartParams": {"object-store-memory": str(_OBJECT_STORE_BYTES)},
            "template": self._template(pod),
        }

    def _template(self, pod: dict[str, Any]) -> dict[str, Any]:
        # AKS gives a pod its service account's identity only if it is asked to.
        labels = {"azure.workload.identity/use": "true"} if self.cloud == "azure" else {}
        return {"metadata": {"labels": labels}, "spec": pod} if labels else {"spec": pod}

    def _pod(self, container: dict[str, Any]) -> dict[str, Any]:
        return {
            "serviceAccountName": self.service_account,
            "terminationGracePeriodSeconds": self.drain_s + _GRACE_S,
            "containers": [container],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _SHM}}],
        }

    def _container(self, name: str, resources: dict[str, str]) -> dict[str, Any]:
        # `ray start --block` drains its node for so long when the pod is told to end.
        variables = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(self.drain_s), **self.environment}
        container: dict[str, Any] = {
            "name": name,
            "image": self.image,
            "env": [{"name": variable, "value": value} for variable, value in variables.items()],
            "resources": {"requests": dict(resources), "limits": dict(resources)},
            "securityContext": {"allowPrivilegeEscalation": False},
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        }
        if self.secrets:
            container["envFrom"] = [{"secretRef": {"name": secret}} for secret in self.secrets]
        return container

    def _affinity(self, *, spot: bool) -> dict[str, Any]:
        """Only on spot nodes, or on none; a node without the label counts as none."""
        labels = _SPOT_LABELS[self.cloud].items()
        if spot:  # one of the labels is enough
            terms = [{"matchExpressions": [_expression(key, "In", value)]} for key, value in labels]
        else:
            terms = [{"matchExpressions": [_expression(key, "NotIn", value) for key, value in labels]}]
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _expression(key: str, operator: str, value: str) -> dict[str, Any]:
    return {"key": key, "operator": operator, "values": [value]}


def _toleration(key: str, value: str) -> dict[str, str]:
    """Of a taint that keeps pods away; of any value if none is given."""
    match = {"operator": "Equal", "value": value} if value else {"operator": "Exists"}
    return {"key": key, **match, "effect": "NoSchedule"}


def _split(quantity: str) -> tuple[float, str]:
    number = quantity.rstrip("mkMGTKi")
    return float(number), quantity[len(number) :]
