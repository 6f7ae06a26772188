"""The door to Ray: a local one that only this machine and this run can reach, or a cluster that asks for a token."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import os
import secrets
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import grpc
import ray
from ray._private import ray_constants, services
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from cluster.options import CommandError, UsageError

_OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local Ray: no training data passes through Ray's object store."""
_PROBE_S = 5.0
_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


@contextmanager
def open_ray(*, num_cpus: int, num_gpus: float = 0.0) -> Iterator[bool]:
    """Connect to RAY_ADDRESS's cluster, or start a Ray here that ends with the block.

    A local Ray listens on loopback only, and asks for a random token that nobody else has. What Ray and the workers log
    is shown where this process logs from INFO on, as with `tarmac -v`; otherwise Ray's errors are.

    Args:
        num_cpus: logical CPUs that a local Ray must have at least.
        num_gpus: GPUs that this machine must have for a local Ray.

    Yields:
        Whether it is a local one.

    Raises:
        UsageError: the cluster is not on this machine, and is used or open without a token.
        CommandError: this machine has fewer GPUs.
    """
    options = _log_options()
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        check_access(address)
        with _shut_down_after():
            ray.init(address=address, **options)
            yield False
        return
    options |= {"num_cpus": max(os.cpu_count() or 1, num_cpus), "object_store_memory": _OBJECT_STORE_BYTES}
    with _private_environment(), _shut_down_after():
        ray.init(address="local", include_dashboard=False, **options)
        _check_gpus(num_gpus)
        yield True


def _log_options() -> dict[str, Any]:
    """What `ray.init` is told: on the console, a run's own lines alone, or with `-v` all that there is."""
    verbose = logging.getLogger().isEnabledFor(logging.INFO)
    return {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}


def check_access(address: str) -> None:
    """Refuse a cluster off this machine that is used, or can be used, without a token.

    For whoever is about to talk to it: before `ray.init`, and before the first request to a dashboard.

    Turns Ray's token authentication on for this process if RAY_AUTH_MODE is not set, there is a token, and the cluster
    asks for one: between a process that does and a cluster that does not, actors are lost without a word. A cluster at
    a loopback address needs none.

    Args:
        address: as `ray.init` or Ray's job client takes it: host:port, ray://, http://, https://, auto or local.

    Raises:
        UsageError: authentication is off, there is no token, or the cluster takes calls without one.
        ConnectionError: no dashboard answers at an http address off this machine. There may be one later, so that is
            no refusal.
    """
    reload_auth()
    address = _found(address)
    if address == "local":
        return
    lets_in = _whom_it_lets_in(address)
    if os.environ.get("RAY_AUTH_MODE") is None and lets_in == "token" and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
        reload_auth()
    if _is_loopback(address):
        return
    if lets_in == "silent":
        raise ConnectionError(f"no Ray dashboard answers at {address}; check that this machine can reach it")
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    if mode.lower() != "token" and mode != "not set":
        raise UsageError(
            f"RAY_AUTH_MODE ({mode}) must be token for a Ray cluster that is not on this machine ({address}): whoever "
            "reaches its ports runs code on it; start it with RAY_AUTH_MODE=token and set the same here"
        )
    if not _has_token():
        raise UsageError(
            f"the Ray cluster at {address} is not on this machine and RAY_AUTH_TOKEN (not set) must hold its token; "
            "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to it. A cluster without one is refused: start it with "
            "RAY_AUTH_MODE=token and a token from `ray get-auth-token --generate`"
        )
    if lets_in == "anyone":
        raise UsageError(
            f"the Ray cluster at {address} runs with token authentication off: whoever reaches its ports runs code on "
            "it; start it again with RAY_AUTH_MODE=token and the token in RAY_AUTH_TOKEN on every node"
        )


@contextmanager
def _shut_down_after() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise  # Ray dies with this process; shut down under the fitting thread it takes the process with it
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


@contextmanager
def _private_environment() -> Iterator[None]:
    """What makes a Ray that is started inside bind to loopback and ask for a token of its own."""
    with tempfile.TemporaryDirectory(prefix="tarmac-ray-token-") as folder:  # readable by this user only
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        changes: dict[str, str | None] = {
            # In a file, not in a variable: environments end up in logs.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": None,
            "RAY_AUTH_TOKEN_PATH": str(token),
            # With it off, Ray takes 127.0.0.1 as this node's address; with an address of another interface, its
            # processes listen on all of them.
            ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
            "GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACE,
            "NCCL_SOCKET_IFNAME": _LOOPBACK_INTERFACE,
        }
        before = {name: os.environ.get(name) for name in changes}
        clusters = ray_constants.ENABLE_RAY_CLUSTER  # what ray made of the variable when it was imported
        try:
            _set_environment(changes)
            ray_constants.ENABLE_RAY_CLUSTER = False
            reload_auth()
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = clusters
            _set_environment(before)
            reload_auth()


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def reload_auth() -> None:
    """Ray reads mode and token once a process; have it read them again."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _check_gpus(need: float) -> None:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    have = resources.get("GPU", 0.0)
    if have < need:
        raise CommandError(
            f"the workers need {need:g} GPUs and this machine has {have:g}; use fewer workers, --gpus-per-worker 0, or "
            "a cluster (RAY_ADDRESS)"
        )


def _has_token() -> bool:
    """Whether Ray finds one: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token."""
    try:
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise UsageError(f"{str(error).splitlines()[0]}; correct it, or set RAY_AUTH_TOKEN instead") from error


def _found(address: str) -> str:
    """The address of this machine's cluster for `auto`; others as they are. Not a secret: no user info."""
    if address == "auto":
        try:
            return str(services.canonicalize_bootstrap_address(address) or address)
        except ConnectionError:
            return "local"  # there is none, as Ray will say
    scheme, separator, rest = address.rpartition("://")
    return scheme + separator + rest.rpartition("@")[2].partition("?")[0]


def _is_loopback(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    if host in ("local", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # another name


def _whom_it_lets_in(address: str) -> Literal["anyone", "token", "silent"]:
    """By asking it something without a token. `silent` is for dashboards only: another port that does not answer
    counts as one that asks for a token, since connecting will say so."""
    if address.startswith(("http://", "https://")):
        return _whom_a_dashboard_lets_in(address.rstrip("/"))
    if "://" in address:
        return "token"
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=_PROBE_S)
        except grpc.RpcError:
            return "token"
    return "anyone"


def _whom_a_dashboard_lets_in(url: str) -> Literal["anyone", "token", "silent"]:
    try:
        told = _dashboard_answer(f"{url}/api/authentication_mode")
        if told is None:  # a Ray that knows of no authentication, or a gate in front of one
            return "token" if _dashboard_answer(f"{url}/api/version") is None else "anyone"
    except (OSError, http.client.HTTPException):
        return "silent"
    return "anyone" if told.get("authentication_mode") == "disabled" else "token"


def _dashboard_answer(url: str) -> dict[str, Any] | None:
    """What it says to somebody without a token; None if it says no, or nothing that Ray would.

    Raises:
        OSError: nothing answers there, or a gate that finds nobody behind it.
    """
    try:
        with urllib.request.urlopen(url, timeout=_PROBE_S) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise
        return None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
