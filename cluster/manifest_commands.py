"""`tarmac manifests`: files with which others start a cluster for a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from cluster.config import JobConfig
from cluster.manifest_kuberay import RayJob
from cluster.manifest_ray_up import RayUp
from cluster.manifests import (
    DRAIN_S,
    Cloud,
    check_drain,
    check_install,
    check_name,
    check_quantity,
    check_url,
    dump,
    nodes_of,
    pairs,
    plain_environment,
    pretrain_command,
)
from cluster.options import UsageError, check_at_least, parse, say
from cluster.run_commands import PretrainOptions, job_of, take_recipe
from trainer import recipes

_HEAD_TYPE = {"aws": "m6i.xlarge", "gcp": "n2-standard-4"}
_WORKER_TYPE = {"aws": "g6.4xlarge", "gcp": "g2-standard-16"}
_REGION = {"aws": "us-west-2", "gcp": "us-central1"}
_ZONE = {"aws": "us-west-2a,us-west-2b", "gcp": "us-central1-a"}


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """What both kinds of manifest have beside the options of `pretrain`."""

    data: str
    """URL of a sharded dataset, in storage that the cluster reaches."""
    run: str
    """URL of the run, in storage that the cluster reaches."""
    name: str | None = None
    """Of the RayJob or the cluster; by default tarmac- and the recipe's name."""
    workers_per_node: int = 1
    """Workers on a node, which is as many GPUs as it has."""
    spot: bool = True
    """Workers on spot nodes. The head is never on one."""
    drain_s: int | None = None
    """Seconds that a node that will be taken away is drained for; by default 90 on AWS, 10 on GCP, 20 on Azure."""
    env: tuple[str, ...] = ()
    """NAME=VALUE of variables for all nodes, AWS_ENDPOINT_URL for example; no credentials."""
    out: Path | None = None
    """File to write; by default the manifest is printed."""


@dataclass(frozen=True, kw_only=True)
class OwnKuberayOptions(SharedOptions):
    """What `manifests kuberay` alone has."""

    image: str
    """Container image with Tarmac and its dependencies."""
    cloud: Cloud
    """Whose spot nodes: their labels, taints and notice."""
    namespace: str = "default"
    """Of everything."""
    service_account: str = "tarmac"
    """Kubernetes service account of all pods, with a role for the bucket."""
    memory_per_worker: str = "32Gi"
    """Of a worker; a pod gets it times --workers-per-node."""
    head_cpus: int = 4
    """Of the head's pod, where the driver runs."""
    head_memory: str = "16Gi"
    """Of the head's pod."""
    backoff_limit: int = 10
    """New clusters that KubeRay starts, one after the other, when the job fails or its cluster is lost."""
    env_from_secret: tuple[str, ...] = ()
    """Kubernetes Secrets whose keys become variables, for stores that know no roles."""
    node_selector: tuple[str, ...] = ()
    """LABEL=VALUE that the workers' nodes must have, cloud.google.com/gke-accelerator=nvidia-l4 for example."""
    toleration: tuple[str, ...] = ()
    """TAINT=VALUE of NoSchedule taints of your own that workers tolerate."""
    ft_redis_address: str | None = None
    """host:port of a Redis that keeps the head's state; of little use to a RayJob, see docs/kubernetes.md."""
    ft_redis_secret: str | None = None
    """Kubernetes Secret with Redis' `password`."""


@dataclass(frozen=True, kw_only=True)
class KuberayOptions(PretrainOptions, OwnKuberayOptions):
    """Print a run as a KubeRay RayJob, for `kubectl apply`. Needs KubeRay 1.5.1 or newer.

    Its command is that of `pretrain`; fields and workers are given here as there.

    Example: tarmac manifests kuberay mae_base_800ep --data s3://bucket/imagenet/train --run s3://bucket/runs/b \\
        --image registry.example/tarmac:1 --cloud aws --num-workers 4:8 --gpus-per-worker 1 | kubectl apply -f -
    """


@dataclass(frozen=True, kw_only=True)
class OwnRayUpOptions(SharedOptions):
    """What `manifests ray-up` alone has."""

    cloud: Literal["aws", "gcp"]
    """EC2 or Compute Engine."""
    region: str | None = None
    """By default us-west-2, us-central1."""
    zone: str | None = None
    """Availability zones, with commas between them; those of the default region by default."""
    project: str | None = None
    """GCP's project id."""
    image: str | None = None
    """AMI id, by default the one that Ray knows for the region; on GCP the source image, which must be given."""
    identity: str | None = None
    """Name of an EC2 instance profile, or email of a GCP service account, that may use the bucket."""
    head_type: str | None = None
    """Machine type of the head; by default m6i.xlarge, n2-standard-4."""
    worker_type: str | None = None
    """Machine type of workers; by default g6.4xlarge, g2-standard-16, each with one L4."""
    install: str | None = None
    """What pip installs on every node; must be given: a wheel here, which `ray up` copies to them, or a requirement
    with a URL, as in 'tarmac[gpu] @ https://host/tarmac-0.1.0-py3-none-any.whl' or git+https://host/tarmac@COMMIT."""


@dataclass(frozen=True, kw_only=True)
class RayUpOptions(PretrainOptions, OwnRayUpOptions):
    """Print a cluster file for `ray up`, with the commands that start the run on it as its heading.

    Example: tarmac manifests ray-up mae_base_800ep --data s3://bucket/imagenet/train --run s3://bucket/runs/b \\
        --cloud aws --num-workers 8 --gpus-per-worker 1 --identity tarmac-bucket \\
        --install dist/tarmac-0.1.0-py3-none-any.whl --out cluster.yaml
    """


def manifests(arguments: list[str]) -> int:
    """Print the files that start a cluster for a run: KubeRay, ray up."""
    if arguments and arguments[0] in ("-h", "--help"):
        console = Console()
        say(console, "usage: tarmac manifests KIND RECIPE ...\n")
        for name, command in KINDS.items():
            say(console, f"  {name:<12} {(command.__doc__ or '').splitlines()[0]}")
        say(console, "\nExample: tarmac manifests kuberay mae_base_800ep --help")
        raise SystemExit(0)
    if not arguments or arguments[0] not in KINDS:
        given = f"unknown kind {arguments[0]!r}" if arguments else "manifests needs a kind first"
        raise UsageError(f"{given}; known are {', '.join(KINDS)}")
    return KINDS[arguments[0]](arguments[1:])


def kuberay(arguments: list[str]) -> int:
    """A RayJob for `kubectl apply`."""
    usage = "manifests kuberay RECIPE --data URL --run URL --image IMAGE --cloud CLOUD [field overrides]"
    recipe, arguments = take_recipe("manifests kuberay", arguments, usage, KuberayOptions.__doc__ or "")
    missing = dict.fromkeys(("data", "run", "image", "cloud"), tyro.MISSING)
    default = KuberayOptions(**missing, train=recipes.get(recipe))
    options = parse(KuberayOptions, arguments, f"manifests kuberay {recipe}", default)
    _, overrides = tyro.cli(OwnKuberayOptions, args=arguments, return_unknown_args=True)
    job = _job_of(options)
    name, drain_s = _name(options, recipe), _drain_s(options, options.cloud)
    _check_kuberay(options)
    document = RayJob(
        name=name,
        namespace=options.namespace,
        entrypoint=pretrain_command(recipe, job, overrides),
        labels={"run": job.run, "recipe": recipe, "data": job.data},
        image=options.image,
        nodes=nodes_of(job, options.workers_per_node),
        cloud=options.cloud,
        spot=options.spot,
        drain_s=drain_s,
        backoff_limit=options.backoff_limit,
        service_account=options.service_account,
        memory_per_worker=options.memory_per_worker,
        head_cpus=options.head_cpus,
        head_memory=options.head_memory,
        environment=plain_environment(options.env),
        secrets=options.env_from_secret,
        node_selector=pairs("node-selector", options.node_selector),
        tolerations=pairs("toleration", options.toleration),
        redis_address=options.ft_redis_address,
        redis_secret=options.ft_redis_secret,
    ).manifest()
    heading = f"{recipe} on KubeRay: kubectl apply -f this file. Its service account needs a role for the bucket."
    return _give(dump(document, heading), options.out)


def ray_up(arguments: list[str]) -> int:
    """A cluster file for `ray up`."""
    usage = "manifests ray-up RECIPE --data URL --run URL --cloud aws|gcp --install WHEEL|URL [field overrides]"
    recipe, arguments = take_recipe("manifests ray-up", arguments, usage, RayUpOptions.__doc__ or "")
    missing = dict.fromkeys(("data", "run", "cloud"), tyro.MISSING)
    default = RayUpOptions(**missing, train=recipes.get(recipe))
    options = parse(RayUpOptions, arguments, f"manifests ray-up {recipe}", default)
    _, overrides = tyro.cli(OwnRayUpOptions, args=arguments, return_unknown_args=True)
    job = _job_of(options)
    cloud, name = options.cloud, _name(options, recipe)
    _check_ray_up(options)
    document = RayUp(
        name=name,
        cloud=cloud,
        region=options.region or _REGION[cloud],
        zone=options.zone or _ZONE[cloud],
        project=options.project,
        image=options.image,
        identity=options.identity,
        head_type=options.head_type or _HEAD_TYPE[cloud],
        worker_type=options.worker_type or _WORKER_TYPE[cloud],
        nodes=nodes_of(job, options.workers_per_node),
        spot=options.spot,
        drain_s=_drain_s(options, cloud),
        install=check_install(options.install),
        environment=plain_environment(options.env),
    ).manifest()
    command = pretrain_command(recipe, job, overrides).replace(" pretrain ", " submit ", 1)
    heading = (
        "ray get-auth-token --generate    # once: the token of this machine and of the cluster\n"
        "ray up FILE && ray dashboard FILE    # this file; the second stays, and tunnels to the head\n"
        f"RAY_AUTH_MODE=token {command} --address http://127.0.0.1:8265 --wait"
    )
    return _give(dump(document, heading), options.out)


def _check_kuberay(options: KuberayOptions) -> None:
    for option in ("namespace", "service_account"):
        check_name(option.replace("_", "-"), getattr(options, option))
    for option in ("memory_per_worker", "head_memory"):
        check_quantity(option.replace("_", "-"), getattr(options, option))
    check_at_least(options, head_cpus=1, backoff_limit=0)
    for secret in (*options.env_from_secret, *filter(None, [options.ft_redis_secret])):
        check_name("ft-redis-secret" if secret == options.ft_redis_secret else "env-from-secret", secret)
    if options.ft_redis_secret is not None and options.ft_redis_address is None:
        raise UsageError("--ft-redis-secret needs --ft-redis-address: without a Redis there is no fault tolerance")
    if options.ft_redis_address is not None:
        host, _, port = options.ft_redis_address.rpartition(":")
        if not host or not port.isdecimal() or "@" in host:
            raise UsageError(
                "--ft-redis-address must be host:port, with no user or password in it; those are in --ft-redis-secret"
            )


def _check_ray_up(options: RayUpOptions) -> None:
    if (options.region is None) != (options.zone is None):
        raise UsageError("--region and --zone must be given together: zones belong to a region")
    if options.cloud == "aws" and options.project is not None:
        raise UsageError("--project is GCP's; leave it out with --cloud aws")
    for option in ("project", "image"):
        if options.cloud == "gcp" and getattr(options, option) is None:
            raise UsageError(f"--cloud gcp needs --{option}")


def _job_of(options: KuberayOptions | RayUpOptions) -> JobConfig:
    for name in ("data", "run"):
        check_url(name, getattr(options, name))
    return job_of(options)


def _name(options: SharedOptions, recipe: str) -> str:
    name = options.name or f"tarmac-{recipe.replace('_', '-')}"
    check_name("name", name)
    return name


def _drain_s(options: SharedOptions, cloud: Cloud) -> int:
    drain_s = DRAIN_S[cloud] if options.drain_s is None else options.drain_s
    check_drain(drain_s)
    return drain_s


def _give(text: str, out: Path | None) -> int:
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")
        say(Console(), f"wrote {out}")
    return 0


KINDS: dict[str, Callable[[list[str]], int]] = {"kuberay": kuberay, "ray-up": ray_up}
