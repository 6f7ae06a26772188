"""One driver a run: on local paths, on a store with conditional puts, and on one without."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cluster.lease import LeaseError, acquire, check_lease, is_stale, read_lease
from pipeline.store import Store

TERM_S = 2.0
HOLDER = """
import sys, time
from cluster.lease import acquire
from pipeline.store import Store
with acquire(Store(sys.argv[1]), float(sys.argv[2])) as lease:
    print(lease.record.driver, flush=True)
    while lease.lost_to is None:
        time.sleep(0.05)
    print("lost to", lease.lost_to.driver, flush=True)
"""


@pytest.fixture
def run(store_url):
    return Store(store_url).child("run")


@pytest.fixture
def hold(run):
    """Starts a process that holds the run's lease."""
    started = []

    def start(term_s=TERM_S):
        command = [sys.executable, "-c", HOLDER, run.url, str(term_s)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert len(process.stdout.readline().strip()) == 16
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def elsewhere(run):
    """Makes the lease look like one of another machine: then only its silence tells that its holder is dead."""
    lease = read_lease(run)
    record = json.loads(lease.to_json()) | {"host": "elsewhere", "kernel": "another"}
    run.write(f"lease/{lease.generation:06d}.json", json.dumps(record).encode())
    return lease


def test_a_released_lease_is_followed_at_once_and_counted_up(run):
    assert read_lease(run) is None
    for generation in (1, 2, 3):
        with acquire(run) as lease:
            assert lease.record.generation == generation
            assert not is_stale(read_lease(run))
            check_lease(run, generation)
        assert is_stale(read_lease(run))
    assert [entry.path for entry in run.list("lease")] == ["lease/000003.json"]
    with pytest.raises(LeaseError, match=r"lease 3; ours was 2"):
        check_lease(run, 2)


def test_a_lease_that_is_renewed_is_refused_with_its_holder(run, hold):
    holder = hold()
    with pytest.raises(LeaseError, match=f"driven by process {holder.pid} on .*one driver at a time"):
        acquire(run, TERM_S)
    assert read_lease(run).pid == holder.pid


def test_a_dead_holder_on_this_machine_is_followed_at_once(run, hold):
    holder = hold(term_s=3600.0)
    holder.kill()
    holder.wait()
    assert is_stale(read_lease(run))
    with acquire(run) as lease:
        assert lease.record.generation == 2


def test_a_silent_holder_loses_the_lease_after_its_term_and_notices_when_it_wakes(run, hold):
    holder = hold()
    os.kill(holder.pid, signal.SIGSTOP)
    before = elsewhere(run)
    began = time.monotonic()
    with acquire(run, TERM_S) as lease:
        assert time.monotonic() - began >= TERM_S
        assert lease.record.generation == before.generation + 1
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.stdout.readline() == f"lost to {lease.record.driver}\n"
        assert holder.wait(30) == 0
        check_lease(run, lease.record.generation)  # the loser has written nothing over it


def test_of_drivers_that_come_at_once_one_gets_it(run, hold):
    holder = hold()
    os.kill(holder.pid, signal.SIGSTOP)
    elsewhere(run)
    won, refused = [], []

    def try_it():
        try:
            won.append(acquire(run, TERM_S))
        except LeaseError as error:
            refused.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 3)
    assert read_lease(run).driver == won[0].record.driver
    won[0].__exit__(None, None, None)


def test_what_is_no_lease_is_named(run):
    run.write("lease/000001.json", b"{}")
    with pytest.raises(Exception, match=r"lease/000001.json is no lease .* delete it if no driver is at work"):
        read_lease(run)
