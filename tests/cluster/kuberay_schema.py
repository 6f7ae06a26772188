"""KubeRay's RayJob, `ray.io/v1`, as a strict JSON schema, written by hand: it is not the CRD.

Fields, types, enums and bounds are those of docs/reference/api.md of ray-project/kuberay at v1.6.2 (commit 0a9eabd),
which KubeRay generates from its Go types, `authOptions` among them. That page does not say what is required: this is
from ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go of older commits (f6ef3f7 and 3275ee0), where
`rayStartParams` was, which later ones leave out. Stricter than the CRD: of a Redis credential's sources a Secret only,
and no field beside these. Not in it: rules that the operator checks in code, of `rayVersion` beside token mode for
example. A pod template is any object here: tests check it as a Pod against Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Any

STRING = {"type": "string"}
BOOLEAN = {"type": "boolean"}
INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
NUMBER = {"type": "number"}
STRINGS = {"type": "object", "additionalProperties": STRING}
POD_TEMPLATE = {"type": "object", "properties": {"metadata": {"type": "object"}, "spec": {"type": "object"}}} | {
    "required": ["spec"],
    "additionalProperties": False,
}
MANAGED_BY = {"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]}


def strict(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


REDIS_CREDENTIAL = strict(
    {
        "value": STRING,
        "valueFrom": strict({"secretKeyRef": strict({"name": STRING, "key": STRING, "optional": BOOLEAN}, ("key",))}),
    }
)

HEAD_GROUP = strict(
    {
        "template": POD_TEMPLATE,
        "headService": {"type": "object"},
        "enableIngress": BOOLEAN,
        "resources": STRINGS,
        "labels": STRINGS,
        "rayStartParams": STRINGS,
        "serviceType": STRING,
    },
    ("rayStartParams", "template"),
)

WORKER_GROUP = strict(
    {
        "suspend": BOOLEAN,
        "groupName": STRING,
        "replicas": INT32,
        "minReplicas": INT32,
        "maxReplicas": INT32,
        "idleTimeoutSeconds": INT32,
        "resources": STRINGS,
        "labels": STRINGS,
        "rayStartParams": STRINGS,
        "template": POD_TEMPLATE,
        "scaleStrategy": strict({"workersToDelete": {"type": "array", "items": STRING}}),
        "numOfHosts": INT32,
    },
    ("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
)

CLUSTER = strict(
    {
        "upgradeStrategy": strict({"type": {"enum": ["Recreate", "None"]}}),
        "suspend": BOOLEAN,
        "managedBy": MANAGED_BY,
        "autoscalerOptions": {"type": "object"},
        "headServiceAnnotations": STRINGS,
        "enableInTreeAutoscaling": BOOLEAN,
        "authOptions": strict(
            {"mode": {"enum": ["disabled", "token"]}, "secretName": STRING, "enableK8sTokenAuth": BOOLEAN}
        ),
        "gcsFaultToleranceOptions": strict(
            {
                "redisUsername": REDIS_CREDENTIAL,
                "redisPassword": REDIS_CREDENTIAL,
                "externalStorageNamespace": STRING,
                "redisAddress": STRING,
            },
            ("redisAddress",),
        ),
        "headGroupSpec": HEAD_GROUP,
        "rayVersion": STRING,
        "workerGroupSpecs": {"type": "array", "items": WORKER_GROUP},
    },
    ("headGroupSpec",),
)

RAY_JOB = strict(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": strict({"name": STRING, "namespace": STRING, "labels": STRINGS, "annotations": STRINGS}, ("name",)),
        "spec": strict(
            {
                "activeDeadlineSeconds": INT32,
                "backoffLimit": INT32,
                "rayClusterSpec": CLUSTER,
                "submitterPodTemplate": POD_TEMPLATE,
                "metadata": STRINGS,
                "clusterSelector": STRINGS,
                "submitterConfig": strict({"backoffLimit": INT32}),
                "managedBy": MANAGED_BY,
                "deletionStrategy": {"type": "object"},
                "entrypoint": STRING,
                "runtimeEnvYAML": STRING,
                "jobId": STRING,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "entrypointResources": STRING,
                "entrypointNumCpus": NUMBER,
                "entrypointNumGpus": NUMBER,
                "ttlSecondsAfterFinished": INT32,
                "preRunningDeadlineSeconds": INT32 | {"minimum": 1},
                "shutdownAfterJobFinishes": BOOLEAN,
                "suspend": BOOLEAN,
            }
        ),
    },
    ("apiVersion", "kind", "metadata", "spec"),
)
