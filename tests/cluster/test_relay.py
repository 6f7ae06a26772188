"""The driver's and workers' shared memory: crash loops, fatal errors, news taken once."""

from cluster.relay import Relay


def test_news_is_taken_once_and_a_fatal_error_stays():
    relay = Relay(3)
    relay.push({"step": 1})
    relay.announce({"event": "attempt"})
    news = relay.take()
    assert news.records == [{"step": 1}]
    assert news.events == [{"event": "attempt"}]
    assert news.fatal is None
    relay.note_error("connection reset", fatal=False)
    assert relay.take().fatal is None
    relay.note_error("ShardError: a", fatal=True)
    relay.note_error("RuntimeError: collateral", fatal=False)
    assert relay.take().fatal == "ShardError: a"
    assert relay.take().fatal == "ShardError: a"
    assert relay.begin(0) == "ShardError: a"


def test_restarts_from_one_step_without_progress_are_a_crash_loop():
    relay = Relay(2)
    assert relay.begin(0) is None
    assert relay.begin(0) is None
    assert relay.begin(40) is None  # progress in between starts the count anew
    assert relay.begin(40) is None
    relay.note_error("OSError: no space", fatal=False)
    reason = relay.begin(40)
    assert reason is not None
    assert "3 attempts in a row started from step 40" in reason
    assert "no space" in reason


def test_a_stop_request_is_remembered():
    relay = Relay(1)
    assert not relay.stop_requested()
    relay.request_stop()
    assert relay.stop_requested()
