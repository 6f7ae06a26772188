"""Manifests against the validators of those who read them: KubeRay's and Kubernetes' schemas, Ray's cluster files."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.cli import main
from tests.cluster.kuberay_schema import RAY_JOB

URLS = ["--data", "s3://bucket/photos", "--run", "s3://bucket/runs/b"]
GPUS = ["--num-workers", "4:8", "--gpus-per-worker", "1", "--cpus-per-worker", "6"]
KUBERAY = ["manifests", "kuberay", "mae_base_800ep", *URLS, *GPUS, "--image", "registry.example/tarmac:1"]
BARE_RAY_UP = ["manifests", "ray-up", "mae_base_800ep", *URLS, *GPUS]
RAY_UP = [*BARE_RAY_UP, "--install", "tarmac @ https://example/t.whl"]
GCP = ["--cloud", "gcp", "--project", "vision", "--image", "projects/p/global/images/family/f"]
KUBERNETES = "1.34"


@pytest.fixture
def manifest(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], dict[str, Any]]:
    def made(words: list[str]) -> dict[str, Any]:
        assert main(words) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return made


def check_ray_job(job: dict[str, Any]) -> None:
    jsonschema.validate(job, RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod"} | copy.deepcopy(group["template"])
        pod["metadata"] = {"name": "pod"} | pod.get("metadata", {})
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def workers(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


ALL_OPTIONS = [
    *("--name", "night", "--namespace", "vision", "--service-account", "bucket", "--workers-per-node", "4"),
    *("--no-spot", "--drain-s", "45", "--backoff-limit", "3", "--memory-per-worker", "1.5Gi"),
    *("--head-cpus", "8", "--head-memory", "20Gi", "--env", "AWS_ENDPOINT_URL=https://s3.example", "A=b c"),
    *("--env-from-secret", "s3-keys", "--node-selector", "gpu=h100", "--toleration", "team=vision"),
    *("--ft-redis-address", "redis:6379", "--ft-redis-secret", "redis", "--optim.num-steps", "1000"),
]


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
@pytest.mark.parametrize("options", [[], ALL_OPTIONS], ids=["defaults", "all"])
def test_kuberay_and_kubernetes_take_the_ray_job(
    cloud: str, options: list[str], manifest: Callable[[list[str]], dict[str, Any]]
) -> None:
    check_ray_job(manifest([*KUBERAY, "--cloud", cloud, *options]))


def test_the_defaults_of_a_ray_job(manifest: Callable[[list[str]], dict[str, Any]]) -> None:
    job = manifest([*KUBERAY, "--cloud", "azure"])
    spec, group = job["spec"], workers(job)
    assert job["metadata"] == {"name": "tarmac-mae-base-800ep", "namespace": "default"}
    assert spec["metadata"]["run"] == "s3://bucket/runs/b"  # by which `logs` and `stop --now` find it
    assert spec["backoffLimit"] == 10
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "gcsFaultToleranceOptions" not in spec["rayClusterSpec"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (4, 8, 8)
    pod = group["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "6", "memory": "32Gi", "nvidia.com/gpu": "1"}
    drain_s = {variable["name"]: variable["value"] for variable in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(drain_s["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) == 20
    taints = {(toleration["key"], toleration.get("value")) for toleration in pod["tolerations"]}
    assert taints == {("nvidia.com/gpu", None), ("kubernetes.azure.com/scalesetpriority", "spot")}
    head = spec["rayClusterSpec"]["headGroupSpec"]
    for template in (group["template"], head["template"]):
        assert template["metadata"]["labels"] == {"azure.workload.identity/use": "true"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "tolerations" not in head["template"]["spec"]
    assert _terms(pod) == [[("kubernetes.azure.com/scalesetpriority", "In", ["spot"])]]
    assert _terms(head["template"]["spec"]) == [[("kubernetes.azure.com/scalesetpriority", "NotIn", ["spot"])]]


def test_every_option_of_a_ray_job_is_found_in_it(manifest: Callable[[list[str]], dict[str, Any]]) -> None:
    job = manifest([*KUBERAY, "--cloud", "aws", *ALL_OPTIONS])
    spec, group = job["spec"], workers(job)
    cluster, pod = spec["rayClusterSpec"], group["template"]["spec"]
    container = pod["containers"][0]
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert job["metadata"] == {"name": "night", "namespace": "vision"}
    assert spec["backoffLimit"] == 3
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 2, 2)
    assert container["resources"]["requests"] == {"cpu": "24", "memory": "6Gi", "nvidia.com/gpu": "4"}
    assert head["containers"][0]["resources"]["limits"] == {"cpu": "8", "memory": "20Gi"}
    assert pod["terminationGracePeriodSeconds"] == head["terminationGracePeriodSeconds"] == 65
    assert pod["serviceAccountName"] == head["serviceAccountName"] == "bucket"
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert {"key": "team", "operator": "Equal", "value": "vision", "effect": "NoSchedule"} in pod["tolerations"]
    assert {"name": "AWS_ENDPOINT_URL", "value": "https://s3.example"} in container["env"]
    assert {"name": "A", "value": "b c"} in head["containers"][0]["env"]
    assert container["envFrom"] == head["containers"][0]["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    assert container["image"] == "registry.example/tarmac:1"
    password = {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    assert cluster["gcsFaultToleranceOptions"] == {"redisAddress": "redis:6379", "redisPassword": password}
    labels = [("eks.amazonaws.com/capacityType", "NotIn", ["SPOT"]), ("karpenter.sh/capacity-type", "NotIn", ["spot"])]
    assert _terms(pod) == _terms(head) == [labels]


def test_on_eks_either_label_of_a_spot_node_will_do(manifest: Callable[[list[str]], dict[str, Any]]) -> None:
    pod = workers(manifest([*KUBERAY, "--cloud", "aws"]))["template"]["spec"]
    assert [term[0][0] for term in _terms(pod)] == ["eks.amazonaws.com/capacityType", "karpenter.sh/capacity-type"]


def _terms(pod: dict[str, Any]) -> list[list[tuple[str, str, list[str]]]]:
    affinity = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return [
        [(rule["key"], rule["operator"], rule["values"]) for rule in term["matchExpressions"]]
        for term in affinity["nodeSelectorTerms"]
    ]


def test_the_entrypoint_is_a_command_of_tarmac_that_means_the_same_job(
    manifest: Callable[[list[str]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed on the cluster, with what stands in the manifest's own options left out."""
    from cluster import run_commands

    words = shlex.split(manifest([*KUBERAY, "--cloud", "aws", *ALL_OPTIONS])["spec"]["entrypoint"])
    assert words[:2] == ["tarmac", "pretrain"]
    jobs = []
    monkeypatch.setattr(run_commands, "_train", lambda job: jobs.append(job) or 0)
    assert main(words[1:]) == 0
    assert (jobs[0].data, jobs[0].run) == ("s3://bucket/photos", "s3://bucket/runs/b")
    assert (jobs[0].least_workers, jobs[0].num_workers) == (4, 8)
    assert (jobs[0].gpus_per_worker, jobs[0].cpus_per_worker) == (1, 6)
    assert jobs[0].train.optim.num_steps == 1000


MUTATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown field": lambda job: job["spec"].update(backofLimit=3),
    "wrong type": lambda job: job["spec"].update(backoffLimit="3"),
    "number for a string": lambda job: workers(job)["rayStartParams"].update({"num-cpus": 0}),
    "unknown mode": lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="on"),
    "no template": lambda job: workers(job).pop("template"),
    "unknown pod field": lambda job: workers(job)["template"]["spec"].update(terminationGraceSeconds=3),
    "wrong pod type": lambda job: workers(job)["template"]["spec"].update(terminationGracePeriodSeconds="3"),
    "bare container": lambda job: workers(job)["template"]["spec"]["containers"][0].pop("name"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_validators_refuse_a_broken_ray_job(mutation: str, manifest: Callable[[list[str]], dict[str, Any]]) -> None:
    job = manifest([*KUBERAY, "--cloud", "aws"])
    check_ray_job(copy.deepcopy(job))
    MUTATIONS[mutation](job)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_ray_job(job)


@pytest.mark.parametrize("cloud", [["--cloud", "aws"], GCP], ids=["aws", "gcp"])
@pytest.mark.parametrize("spot", ["--spot", "--no-spot"])
def test_ray_takes_the_cluster_file(
    cloud: list[str], spot: str, manifest: Callable[[list[str]], dict[str, Any]]
) -> None:
    cluster = manifest([*RAY_UP, *cloud, spot, "--identity", "bucket", "--drain-s", "33", "--env", "A=b c"])
    validate_config(prepare_config(copy.deepcopy(cluster)))
    types = cluster["available_node_types"]
    marks = ("MarketType", "preemptible")
    assert any(mark in str(types["worker"]) for mark in marks) == (spot == "--spot")
    assert not any(mark in str(types["head"]) for mark in marks)
    assert types["worker"]["resources"] == {"CPU": 6, "GPU": 1}
    assert types["worker"]["max_workers"] == cluster["max_workers"] == 8
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        words = shlex.split(cluster[commands][1])
        assert {"RAY_AUTH_MODE=token", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=33", "A=b c"} <= set(words)
    cluster["available_node_types"]["worker"]["resources"] = {"GPU": "one"}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(cluster))


def test_a_field_that_ray_does_not_know_is_refused(manifest: Callable[[list[str]], dict[str, Any]]) -> None:
    cluster = manifest([*RAY_UP, "--cloud", "aws"]) | {"max_worker": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(cluster))


def test_machines_of_ray_up_are_as_asked(manifest: Callable[[list[str]], dict[str, Any]]) -> None:
    options = ["--region", "eu-west-1", "--zone", "eu-west-1a", "--image", "ami-1", "--name", "night"]
    machines = ["--head-type", "m7i.large", "--worker-type", "p5.48xlarge", "--workers-per-node", "4"]
    cluster = manifest([*RAY_UP, "--cloud", "aws", *options, *machines])
    assert cluster["cluster_name"] == "night"
    assert cluster["provider"]["availability_zone"] == "eu-west-1a"
    nodes = cluster["available_node_types"]
    assert nodes["head"]["node_config"]["InstanceType"] == "m7i.large"
    assert nodes["worker"]["node_config"]["InstanceType"] == "p5.48xlarge"
    assert nodes["worker"]["node_config"]["ImageId"] == "ami-1"
    assert (nodes["worker"]["min_workers"], nodes["worker"]["resources"]) == (2, {"CPU": 24, "GPU": 4})
    assert shlex.split(cluster["setup_commands"][0])[-1] == "tarmac @ https://example/t.whl"


def test_a_wheel_of_this_machine_goes_to_the_nodes(
    tmp_path: Path, manifest: Callable[[list[str]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dist").mkdir()
    Path("dist/tarmac-0.1.0-py3-none-any.whl").touch()
    cluster = manifest([*BARE_RAY_UP, "--cloud", "aws", "--install", "dist/tarmac-0.1.0-py3-none-any.whl"])
    there = "/home/ubuntu/tarmac-0.1.0-py3-none-any.whl"
    assert cluster["file_mounts"] == {
        "/home/ubuntu/.ray/auth_token": "~/.ray/auth_token",
        there: str(tmp_path / "dist/tarmac-0.1.0-py3-none-any.whl"),
    }
    assert shlex.split(cluster["setup_commands"][0]) == ["pip", "install", "--upgrade", f"{there}[gpu]"]
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize(
    "install",
    [
        "git+ssh://git@host/me/tarmac@v1",
        "tarmac[gpu] @ git+https://host/tarmac@0123abc",
        "https://host:80/t.whl#sha256=1",
    ],
)
def test_requirements_with_a_url_are_installed_as_they_are(
    install: str, manifest: Callable[[list[str]], dict[str, Any]]
) -> None:
    cluster = manifest([*BARE_RAY_UP, "--cloud", "aws", "--install", install])
    assert shlex.split(cluster["setup_commands"][0])[-1] == install
    assert list(cluster["file_mounts"]) == ["/home/ubuntu/.ray/auth_token"]


def test_the_heading_of_a_cluster_file_submits_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RAY_UP, "--cloud", "aws"]) == 0
    heading = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    words = shlex.split(heading[-1])
    assert words[:4] == ["RAY_AUTH_MODE=token", "tarmac", "submit", "mae_base_800ep"]
    assert words[words.index("--num-workers") + 1] == "4:8"
    assert "--cloud" not in words


def test_a_manifest_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*KUBERAY, "--cloud", "aws", "--out", str(tmp_path / "job.yaml")]) == 0
    assert yaml.safe_load((tmp_path / "job.yaml").read_text())["kind"] == "RayJob"
    assert "apiVersion" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*KUBERAY, "--cloud", "aws", "--data", "/disk/photos"], "--data (/disk/photos) must be a URL that all nodes"),
        ([*KUBERAY, "--cloud", "aws", "--run", "s3://me:pw@bucket/b"], "must hold no secret"),
        ([*KUBERAY, "--cloud", "aws", "--run", "s3://bucket/b?sig=pw"], "must hold no secret"),
        ([*KUBERAY, "--cloud", "aws", "--env", "AWS_SECRET_ACCESS_KEY=pw"], "looks like a credential"),
        ([*KUBERAY, "--cloud", "aws", "--env", "NAME"], "--env (NAME) must be NAME=VALUE"),
        ([*KUBERAY, "--cloud", "aws", "--name", "Night"], "--name (Night) must be lower-case"),
        (
            [*KUBERAY, "--cloud", "aws", "--workers-per-node", "3"],
            "--workers-per-node (3) must be at least 1",
        ),
        ([*KUBERAY, "--cloud", "aws", "--memory-per-worker", "lots"], "must be a Kubernetes quantity"),
        ([*KUBERAY, "--cloud", "aws", "--drain-s", "0"], "--drain-s (0) must be from 1 to 3600"),
        ([*KUBERAY, "--cloud", "aws", "--ft-redis-secret", "redis"], "needs --ft-redis-address"),
        ([*KUBERAY, "--cloud", "aws", "--ft-redis-address", "u:pw@redis:6379"], "must be host:port"),
        ([*KUBERAY, "--cloud", "aws", "--num-workers", "0"], "num_workers (0) must be at least 1"),
        ([*RAY_UP, "--cloud", "gcp", "--project", "p"], "--cloud gcp needs --image"),
        ([*RAY_UP, "--cloud", "aws", "--project", "p"], "--project is GCP's"),
        ([*RAY_UP, "--cloud", "aws", "--region", "eu-west-1"], "--region and --zone must be given together"),
        ([*BARE_RAY_UP, "--cloud", "aws"], "ray-up needs --install, which must be a wheel here"),
        *(
            ([*BARE_RAY_UP, "--cloud", "aws", "--install", name], "the package `tarmac` there is somebody else's code")
            for name in ("tarmac", "tarmac[gpu]==0.1.0", ".")
        ),
        (
            [*BARE_RAY_UP, "--cloud", "aws", "--install", "no/t.whl"],
            "--install (no/t.whl) must be a wheel that is here",
        ),
        ([*BARE_RAY_UP, "--cloud", "aws", "--install", "https://pw@host/t.whl"], "must hold no secret"),
        ([*BARE_RAY_UP, "--cloud", "aws", "--install", "t @ https://host/t.whl?sig=pw"], "must hold no secret"),
        ([*KUBERAY, "--cloud", "aws", "--run", "s3://KEY:5/pw@bucket/b"], "must have no user, password or query"),
        ([*KUBERAY, "--cloud", "aws", "--run", "s3://KEY:S/pw@bucket/b"], "must have no user, password or query"),
        (["manifests", "helm"], "unknown kind 'helm'; known are kuberay, ray-up"),
    ],
)
def test_wrong_values_are_refused_with_a_reason(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "pw" not in error
