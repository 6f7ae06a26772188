"""Requests to stop, as a driver meets them: old ones, late ones, and a bucket that is down."""

import logging
import os
import signal
import time

import pytest

from cluster import stops
from cluster.stop_request import ask_to_stop, clear_stop, stop_state, stop_taken_back
from cluster.stops import Stops
from pipeline.errors import StoreError
from pipeline.store import Store


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(stops, "_POLL_S", 0.05)
    return Store(str(tmp_path))


def until(reached):
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_request_stops_the_driver_that_begins_after_it_once(run):
    ask_to_stop(run)
    with Stops(run) as stopping:
        until(lambda: stopping.asked_by == "tarmac stop")
        stopping.done()
    assert stop_state(run) == "honoured"
    with Stops(run) as stopping:  # whoever begins another one wants it to go on
        until(lambda: stop_state(run) == "none")
        assert stopping.asked_by == ""
        ask_to_stop(run)
        until(lambda: stopping.asked_by == "tarmac stop")


def test_a_request_that_came_while_a_signal_stopped_the_run_is_done_with(run, monkeypatch):
    monkeypatch.setattr(stops, "_POLL_S", 60.0)
    with Stops(run) as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stopping.asked_by == "SIGTERM")
        until(lambda: stop_state(run) == "none")
        time.sleep(0.2)  # its only look
        ask_to_stop(run)
        stopping.done()
    assert stop_state(run) == "honoured"


def test_a_run_that_ended_in_order_is_no_failure_for_want_of_the_bucket(run, monkeypatch, caplog):
    def fail(store):
        raise StoreError("no answer for 60 s")

    with Stops(run) as stopping, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(stops, "clear_stop", fail)
        stopping.done()
    assert "a request to stop may be left for the next driver: no answer for 60 s" in caplog.text


def interrupted_while_taken_back(run):
    with stop_taken_back(run):
        assert stop_state(run) == "none"
        raise KeyboardInterrupt


def test_a_request_is_taken_back_only_if_what_it_is_for_succeeds(run):
    with stop_taken_back(run):
        assert stop_state(run) == "none"
    ask_to_stop(run)
    with pytest.raises(KeyboardInterrupt):
        interrupted_while_taken_back(run)
    assert stop_state(run) == "asked"
    clear_stop(run)
    with stop_taken_back(run):
        pass
    assert stop_state(run) == "none"
