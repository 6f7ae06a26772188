"""One driver a run: on local paths, on a store with conditional puts, and on one without."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cluster.lease import Lease, LeaseError, acquire, check_lease, is_stale, read_lease
from pipeline.store import Store

TERM_S = 2.0
HOLDER = """
import sys, time
from cluster.lease import acquire
from pipeline.store import Store
with acquire(Store(sys.argv[1]), float(sys.argv[2])) as lease:
    print(lease.record.driver, flush=True)
    while lease.lost is None:
        time.sleep(0.05)
    print(lease.lost, flush=True)
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


def wait_for(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_released_lease_is_followed_at_once_and_counted_up(run):
    assert read_lease(run) is None
    for generation in (1, 2, 3):
        with acquire(run) as lease:
            assert lease.record.generation == generation
            assert not is_stale(read_lease(run))
            check_lease(run, lease.record)
        assert is_stale(read_lease(run))
    assert [entry.path for entry in run.list("lease")] == ["lease/000003.json"]
    with pytest.raises(LeaseError, match=r"lease 3; ours was 2"):
        check_lease(run, dataclasses.replace(lease.record, generation=2))


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
        assert f"(lease {before.generation + 1}; ours was {before.generation})" in holder.stdout.readline()
        assert holder.wait(30) == 0
        check_lease(run, lease.record)  # the loser has written nothing over it


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


def test_of_two_that_hold_one_lease_one_goes_on_and_the_other_writes_no_more(run):
    """Without conditional puts, a creator that is slow overwrites the lease of the one that was faster."""
    ours = acquire(run, 1.0)
    other = Lease(run, dataclasses.replace(ours.record, driver="another"))
    wait_for(lambda: run.write("lease/000001.json", other.record.to_json()) or ours.lost or other.lost)
    winner, loser = (other, ours) if ours.lost else (ours, other)
    assert "another driver, which wrote lease 1 over ours" in loser.lost
    wait_for(lambda: read_lease(run).driver == winner.record.driver)
    with pytest.raises(LeaseError, match="wrote lease 1 over ours"):
        check_lease(run, loser.record)
    loser.__exit__(None, None, None)
    assert not read_lease(run).released
    seen = read_lease(run).renewed
    wait_for(lambda: read_lease(run).renewed > seen)
    assert winner.lost is None
    check_lease(run, winner.record)
    winner.__exit__(None, None, None)
    assert read_lease(run).driver == winner.record.driver
    assert read_lease(run).released


def test_a_lease_that_came_too_late_to_count_is_none(run):
    """Two others come and go while a driver is about to create the lease that follows the one it saw."""

    class Slow(Store):
        def create(self, path, data):
            for _ in range(2):
                acquire(run).__exit__(None, None, None)
            return super().create(path, data)

    acquire(run).__exit__(None, None, None)
    with pytest.raises(LeaseError, match=r"lease 3; ours was 2"):
        acquire(Slow(run.url))
    assert read_lease(run).generation == 3
    with acquire(run) as lease:
        assert lease.record.generation == 4


def test_a_lease_is_lost_though_the_one_that_follows_cannot_be_read(run):
    with acquire(run, 0.4) as lease:
        run.write("lease/000002.json", b"{}")
        wait_for(lambda: lease.lost)
        with pytest.raises(LeaseError, match=r"lease 2; ours was 1"):
            lease.check()


def test_a_holder_that_cannot_read_its_lease_goes_on_to_ask(run):
    with acquire(run, 0.4) as lease:
        run.write("lease/000001.json", b"{}")
        time.sleep(1.0)
        assert lease.lost is None
        run.write("lease/000002.json", dataclasses.replace(lease.record, generation=2, driver="another").to_json())
        wait_for(lambda: lease.lost)
