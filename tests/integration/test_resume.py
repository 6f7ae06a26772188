"""Kill workers and drivers of real runs on a real two-node Ray cluster; compare with a run that was never touched."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from ray.cluster_utils import Cluster
from scraping import scrape_until

from cluster.cli import main
from pipeline.store import Store
from tests.console_lines import strange_lines
from trainer.checkpoint import find_resume, load
from trainer.mae import build_mae
from trainer.metrics import read_events, read_metrics
from trainer.optim import build_optimizer
from trainer.run_files import read_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS = 60
TINY = [
    *("--data.global-batch-size", "12", "--data.num-lanes", "6", "--data.augment.image-size", "64", "64"),
    *("--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2"),
    *("--model.decoder-embed-dim", "32", "--model.decoder-depth", "1", "--model.decoder-num-heads", "2"),
    *("--parallel.precision", "fp32", "--optim.num-steps", str(NUM_STEPS), "--optim.base-lr", "1e-2"),
    *("--checkpoint.every-steps", "7", "--log.every-steps", "1", "--log.flush-s", "0.3"),
]


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs and two nodes with one each: every worker is on a node of its own."""
    # Without this a test's error about the cluster's own clean-up would be the last thing that is read.
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def dataset(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    for photo in photos:
        (folder / "photos" / photo.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / "photos" / photo.parent.name / photo.name)
    url = str(folder / "dataset")
    assert main(["shard", str(folder / "photos"), url, "--num-workers", "1", "--shard-bytes", "300000"]) == 0
    return url


class Driver:
    """A `tarmac pretrain` in a process of its own."""

    def __init__(self, cluster, dataset, run, num_workers=2, options=()):
        options = [*TINY, *options, "--data", dataset, "--run", run]
        command = [sys.executable, "-m", "cluster.cli", "pretrain", "demo", *options]
        self.run = Store(run)
        self.log = open(f"{run}.log", "a+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, "--num-workers", str(num_workers)],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait_for_step(self, step, timeout_s=180):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            records = read_metrics(self.run)
            if records and records[-1]["step"] >= step:
                return
            assert self.process.poll() is None, self.output()
            time.sleep(0.05)
        raise AssertionError(f"step {step} was not reached in {timeout_s} s: {self.output()}")

    def output(self):
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def finish(self):
        code = self.process.wait(timeout=300)
        text = self.output()
        self.log.close()
        return code, text


def finished(cluster, dataset, run, num_workers=2):
    code, text = Driver(cluster, dataset, run, num_workers).finish()
    assert code == 0, text
    return text


def kill_worker(run, rank):
    os.kill(last_start(run)["pids"][rank], signal.SIGKILL)


def last_start(run):
    return [event for event in read_events(run) if event["event"] == "start"][-1]


def controllers():
    """Process ids of Ray Train's controllers on the nodes that this process has started."""
    return {process.pid for process in ray_processes("TrainController")}


def waiting():
    """Process ids of those that have imported PyTorch and have no work."""
    return {process.pid for process in ray_processes("ray::IDLE") if has_torch(process)}


def ray_processes(name):
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def has_torch(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("libtorch_cpu" in part.path for part in process.memory_maps())
    return False


def wait_until(is_true, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def weights(run_url):
    """Every tensor of the newest verified checkpoint, on one rank."""
    run = Store(run_url)
    config = read_run(run).config
    model = build_mae(config)
    optimizer = build_optimizer(config, model)
    commit = find_resume(run, lambda path, reason: pytest.fail(f"{path}: {reason}"))
    assert commit is not None
    assert commit.step == NUM_STEPS
    load(run, commit, model, optimizer)
    moments = {f"{key}/{name}": value for key, state in optimizer.state.items() for name, value in state.items()}
    return dict(model.state_dict()) | {f"moment {i}": value for i, value in enumerate(moments.values())}


@pytest.fixture(scope="module")
def undisturbed(cluster, dataset, tmp_path_factory):
    run = str(tmp_path_factory.mktemp("undisturbed") / "run")
    finished(cluster, dataset, run)
    return run


def test_a_killed_worker_and_a_killed_driver_leave_no_trace_in_the_result(cluster, dataset, undisturbed, tmp_path):
    run = str(tmp_path / "run")
    driver = Driver(cluster, dataset, run)
    driver.wait_for_step(10)
    kill_worker(driver.run, rank=1)
    driver.wait_for_step(25)
    driver.process.kill()
    code, text = driver.finish()
    assert code == -signal.SIGKILL
    assert "resumed by itself" in text
    assert strange_lines(text) == []
    text = finished(cluster, dataset, run)
    assert "from the checkpoint of step" in text
    assert strange_lines(text) == []

    starts = [event for event in read_events(Store(run)) if event["event"] == "start"]
    assert len(starts) >= 3
    assert starts[0]["step"] == 0
    assert all(event["step"] % 7 == 0 and event["step"] > 0 for event in starts[1:])

    before, after = read_metrics(Store(undisturbed)), read_metrics(Store(run))
    assert [record["step"] for record in after] == list(range(1, NUM_STEPS + 1))
    for name in ("loss", "grad_norm", "lr", "sample_ids_digest"):
        assert [record[name] for record in before] == [record[name] for record in after], name
    first, second = weights(undisturbed), weights(run)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_world_size_trains_on_the_same_samples_with_the_same_losses(cluster, dataset, undisturbed, tmp_path):
    """Two workers, killed on the way; one worker to the end. The first launch is given relative paths."""
    run = str(tmp_path / "run")
    driver = Driver(cluster, os.path.relpath(dataset), os.path.relpath(run))
    driver.wait_for_step(10)
    driver.process.kill()
    driver.finish()
    finished(cluster, dataset, run, num_workers=1)
    worlds = [event["world_size"] for event in read_events(Store(run)) if event["event"] == "start"]
    assert worlds == [2, 1]
    before, after = read_metrics(Store(undisturbed)), read_metrics(Store(run))
    assert [r["sample_ids_digest"] for r in before] == [r["sample_ids_digest"] for r in after]
    assert [r["loss"] for r in after] == pytest.approx([r["loss"] for r in before], abs=1e-4)


def test_a_stop_signal_saves_and_exits_75_and_the_same_command_goes_on(cluster, dataset, undisturbed, tmp_path):
    run = str(tmp_path / "run")
    driver = Driver(cluster, dataset, run)
    driver.wait_for_step(10)
    driver.process.terminate()
    code, text = driver.finish()
    assert code == 75, text
    stopped_at = [event for event in read_events(Store(run)) if event["event"] == "stop"][-1]["step"]
    assert stopped_at < NUM_STEPS
    assert f"stopped at step {stopped_at} of {NUM_STEPS}" in text
    text = finished(cluster, dataset, run)
    assert f"from the checkpoint of step {stopped_at}" in text
    losses = [record["loss"] for record in read_metrics(Store(run))]
    assert losses == [record["loss"] for record in read_metrics(Store(undisturbed))]
    assert "is at step 60 of 60" in finished(cluster, dataset, run)  # a finished run says so


def test_a_spare_node_is_ready_for_workers_and_nothing_is_left_behind(cluster, dataset, tmp_path):
    cluster.add_node(num_cpus=1)
    driver = Driver(cluster, dataset, str(tmp_path / "run"), options=["--optim.num-steps", "1000000"])
    driver.wait_for_step(1)
    wait_until(lambda: len(waiting()) == 1)
    ready, used = servers(waiting()), ancestors(last_start(driver.run)["pids"])
    assert not ready & used
    lost = next(node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid in used)
    cluster.remove_node(lost, allow_graceful=False)
    driver.wait_for_step(last_record(driver.run)["step"] + 20)
    start = last_start(driver.run)
    assert start["world_size"] == 2
    assert ready < ancestors(start["pids"])
    driver.process.terminate()
    code, text = driver.finish()
    assert code == 75, text
    wait_until(lambda: not controllers() | waiting())  # Ray ends a driver's actors soon after it


def ancestors(processes):
    return {parent.pid for pid in processes for parent in psutil.Process(pid).parents()}


def check_metrics(driver, port):
    """What Prometheus reads from the driver's node, of a run of two workers that lost one of them once."""
    run = str(driver.run)
    exported = {"ray_tarmac_restarts_total": 1, "ray_tarmac_preemption_notices_total": 0, "ray_tarmac_workers": 2}

    def trains(found):  # Ray exports every ten seconds
        return exported.items() <= found.items() and found.get("ray_tarmac_images_per_second", 0) > 0

    found = scrape_until(port, run, trains)
    assert trains(found), found
    assert found["ray_tarmac_checkpoints_total"] > 0
    assert 0 <= found["ray_tarmac_data_wait_ratio"] <= 1
    step = found["ray_tarmac_step"]
    driver.wait_for_step(step)  # the run has it too
    found = scrape_until(port, run, lambda found: found.get("ray_tarmac_step", 0) > step)
    assert found["ray_tarmac_step"] > step


def test_a_controller_that_is_killed_leaves_its_workers_place_to_the_next(cluster, dataset, tmp_path):
    """The workers have all the CPUs there are."""
    driver = Driver(cluster, dataset, str(tmp_path / "run"))
    driver.wait_for_step(1)
    (first,) = controllers()
    os.kill(first, signal.SIGKILL)
    code, text = driver.finish()
    assert code == 0, text
    start = last_start(driver.run)
    assert (start["attempt"], start["world_size"]) == (2, 2)


def test_workers_and_controllers_are_forked_from_what_their_nodes_first_left(cluster, dataset, tmp_path):
    driver = Driver(cluster, dataset, str(tmp_path / "run"), options=["--optim.num-steps", "1000000"])
    driver.wait_for_step(10)
    before = servers(last_start(driver.run)["pids"]), servers(controllers())
    kill_worker(driver.run, rank=1)
    driver.wait_for_step(last_record(driver.run)["step"] + 20)
    assert last_start(driver.run)["attempt"] == 2
    assert (servers(last_start(driver.run)["pids"]), servers(controllers())) == before
    assert [len(one) for one in before] == [2, 1]
    check_metrics(driver, cluster.head_node.metrics_export_port)
    driver.process.terminate()
    code, text = driver.finish()
    assert code == 75, text
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before[1]), 30)  # the driver was its owner


def servers(processes):
    parents = {psutil.Process(pid).parent() for pid in processes}
    assert all("cluster.fork_server" in parent.cmdline() for parent in parents)
    return {parent.pid for parent in parents}


def last_record(run):
    return read_metrics(run)[-1]


def test_without_standby_nothing_waits(cluster, dataset, tmp_path):
    options = ["--optim.num-steps", "1000000", "--no-standby"]
    driver = Driver(cluster, dataset, str(tmp_path / "run"), num_workers=1, options=options)
    driver.wait_for_step(1)
    time.sleep(15)  # with it, a process waits on the other node as soon as it has imported
    assert waiting() == set()
    driver.process.terminate()
    code, text = driver.finish()
    assert code == 75, text


def test_a_fault_that_a_restart_cannot_mend_ends_the_run_with_its_reason(cluster, dataset, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(dataset, broken)
    for shard in broken.glob("*.tar"):
        data = bytearray(shard.read_bytes())
        data[: len(data) - 1024] = bytes(len(data) - 1024)  # the size stays, every image is damaged
        shard.write_bytes(data)
    code, text = Driver(cluster, str(broken), str(tmp_path / "run")).finish()
    assert code == 1, text
    assert "ShardError" in text
