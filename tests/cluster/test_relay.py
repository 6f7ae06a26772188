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
    relay.note_error("RuntimeError: connection reset", fatal=False)
    relay.note_error("RuntimeError: collateral", fatal=False)
    news = relay.take()
    assert news.fatal is None
    assert news.events == [{"event": "error", "error": "RuntimeError: connection reset"}]
    relay.note_error("ShardError: a", fatal=True)
    relay.note_error("RuntimeError: collateral", fatal=False)
    assert relay.take().fatal == "ShardError: a"
    assert relay.take().fatal == "ShardError: a"
    assert not relay.admit(80)


def test_attempts_without_progress_are_a_crash_loop():
    relay = Relay(2)
    for committed in (0, 0, 40, 40):  # progress in between starts the count anew
        assert relay.admit(committed)
    relay.note_error("OSError: no space", fatal=False)
    assert not relay.admit(40)
    reason = relay.take().fatal
    assert reason is not None
    assert "2 attempts in a row committed nothing after step 40" in reason
    assert "no space" in reason


def test_attempts_that_never_reach_the_store_are_a_crash_loop_too():
    relay = Relay(3)
    assert [relay.admit(None) for _ in range(4)] == [True, True, True, False]
    assert "committed nothing after step 0" in str(relay.take().fatal)


def test_a_stop_request_is_remembered():
    relay = Relay(1)
    assert not relay.stop_requested()
    relay.request_stop()
    assert relay.stop_requested()
