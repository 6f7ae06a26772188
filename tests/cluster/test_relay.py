"""The driver's and workers' shared memory: news taken once, errors of an attempt that stay, wishes."""

from dataclasses import replace

from cluster.relay import Relay, Worker
from trainer.wishes import Wish


def relay_of(attempt: int) -> Relay:
    relay = Relay()
    relay.begin(attempt)
    return relay


def test_news_is_taken_once_and_an_attempts_errors_stay():
    relay = relay_of(1)
    relay.push(1, {"step": 1})
    relay.announce(1, {"event": "attempt"})
    news = relay.take()
    assert (news.records, news.events, news.error, news.fatal) == ([{"step": 1}], [{"event": "attempt"}], None, None)
    relay.note_error(1, "RuntimeError: connection reset", fatal=False)
    relay.note_error(1, "RuntimeError: collateral", fatal=False)
    relay.note_error(1, "ShardError: a", fatal=True)
    for _ in range(2):
        news = relay.take()
        assert (news.records, news.events) == ([], [])
        assert (news.error, news.fatal) == ("RuntimeError: connection reset", "ShardError: a")


def test_what_workers_of_an_earlier_attempt_still_say_does_not_count():
    relay = relay_of(1)
    relay.note_error(1, "ShardError: a", fatal=True)
    relay.wish(Wish.STOP)
    relay.begin(2)
    relay.push(1, {"step": 7})
    relay.announce(1, {"event": "save"})
    relay.note_error(1, "late", fatal=True)
    relay.note_workers(1, [Worker("node", 1, 2)], "{}")
    relay.note_pulse(1, 0)
    news = relay.take()
    assert (news.records, news.events, news.workers, news.fatal) == ([], [], [], None)
    assert relay.take_wish(2) is Wish.GO_ON


def test_a_save_is_asked_for_once_and_a_stop_until_it_is_done():
    relay = relay_of(1)
    assert relay.take_wish(1) is Wish.GO_ON
    relay.wish(Wish.SAVE)
    assert relay.take_wish(0) is Wish.GO_ON  # not the one that was asked
    assert [relay.take_wish(1) for _ in range(2)] == [Wish.SAVE, Wish.GO_ON]
    relay.wish(Wish.STOP)
    relay.wish(Wish.SAVE)
    assert [relay.take_wish(1) for _ in range(2)] == [Wish.STOP, Wish.STOP]


def test_workers_are_known_before_their_first_sign_of_life_and_silent_until_the_next():
    relay = relay_of(3)
    workers = [Worker("a", 10, 100), Worker("b", 11, 101)]
    relay.note_workers(3, workers, '{"env_vars": {}}')
    news = relay.take()
    assert news.workers == workers  # silent_s is None
    assert news.environment == '{"env_vars": {}}'
    relay.note_pulse(3, 0)
    relay.note_pulse(3, 1)
    first = relay.take().workers
    assert [replace(worker, silent_s=None) for worker in first] == workers
    relay.note_pulse(3, 1)
    old, young = (worker.silent_s for worker in relay.take().workers)
    assert None not in (old, young)
    assert old > first[0].silent_s
    assert young < old


def test_notices_come_whichever_attempt_runs():
    relay = relay_of(1)
    relay.note_notice({"node": "a", "source": "ec2", "deadline": None})
    relay.begin(2)
    assert [relay.take().notices, relay.take().notices] == [[{"node": "a", "source": "ec2", "deadline": None}], []]


def test_a_place_is_of_the_attempt_that_runs():
    relay = relay_of(1)
    relay.note_place(2, "another's")
    assert relay.place(1) is None
    relay.note_place(1, "ours")
    assert relay.place(1) == "ours"
    assert relay.place(2) is None
    relay.begin(2)
    assert relay.place(1) is None
    assert relay.place(2) is None
