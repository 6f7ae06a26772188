"""A one-node Ray cluster with a dashboard, in processes of its own, that can be killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from secrets import token_hex

import requests

from cluster.local_s3 import _free_port

START_TIMEOUT_S = 120.0
NUM_TRIES = 3
CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"),
    *("AZURE_STORAGE_KEY", "AZURE_CLIENT_SECRET", "HF_TOKEN", "WANDB_API_KEY", "USER", "LOGNAME"),
)
CANARIES = {name: f"canary{number}secret" for number, name in enumerate(CREDENTIALS)}
"""What a submitting machine has in its environment, and must keep to itself."""


_SERVE = """
import json, signal, sys
from ray.cluster_utils import Cluster

Cluster(initialize_head=True, head_node_args=json.loads(sys.argv[1]))
open(sys.argv[2], "w").close()
signal.pause()
"""
# Not `ray start --block`: that begins a Ray Client server too, on which the whole head depends.


class RayHead:
    """A head with token authentication, by a Python with Ray. A context manager; leaving it kills what was started."""

    def __init__(
        self, num_cpus: int = 2, environment: dict[str, str] | None = None, python: Path = Path(sys.executable)
    ) -> None:
        self.num_cpus, self.environment, self.python = num_cpus, environment or {}, python
        self.token = token_hex(16)
        self.folder = Path(tempfile.mkdtemp(prefix="trm-", dir="/tmp"))  # short: sockets are below it
        self.log, self.ready = self.folder.with_suffix(".log"), self.folder / "ready"
        self.port, self.dashboard_port = _free_port(0), _free_port(0)
        self.address = f"http://127.0.0.1:{self.dashboard_port}"
        self.process: subprocess.Popen[bytes] | None = None

    def client_environment(self) -> dict[str, str]:
        """What a client needs to be let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self) -> None:
        """Start it, again on the same ports; returns when its dashboard takes jobs."""
        for _ in range(NUM_TRIES):
            self._begin()
            if self._is_up():
                return
            self.kill()
        raise AssertionError(self.log.read_text())

    def _begin(self) -> None:
        programs = str(self.python.parent)
        environment = os.environ | self.environment | self.client_environment()
        environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        # A job's driver finds its cluster by a file there; the one in /tmp/ray is of whoever started Ray last.
        environment["RAY_TMPDIR"] = str(self.folder)
        for name in ("RAY_ADDRESS", "PYTHONPATH"):
            environment.pop(name, None)
        node = {
            **{"gcs_server_port": self.port, "dashboard_port": self.dashboard_port, "dashboard_host": "127.0.0.1"},
            **{"include_dashboard": True, "num_cpus": self.num_cpus},
            **{"dashboard_agent_listen_port": _free_port(0)},
        }
        self.ready.unlink(missing_ok=True)
        command = [str(self.python), "-c", _SERVE, json.dumps(node), str(self.ready)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _is_up(self) -> bool:
        """Wait for it; False if it gave up, as Ray does on a machine that is too busy."""
        assert self.process is not None
        headers = {"Authorization": f"Bearer {self.token}"}
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.ready.exists() and requests.get(f"{self.address}/api/jobs/", headers=headers, timeout=5).ok:
                    return True
            except requests.ConnectionError:
                pass
            time.sleep(0.2)
        return False

    def kill(self) -> None:
        """SIGKILL, as if the machine were gone: the kernel takes the processes that it started with it."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __enter__(self) -> RayHead:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)
