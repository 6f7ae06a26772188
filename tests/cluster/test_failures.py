"""When a run is given up, and how long it waits before."""

from cluster.failures import Failures


def test_attempts_without_progress_are_a_crash_loop():
    failures = Failures(3, committed=0)
    assert failures.add(0, "a") is None
    assert failures.add(40, "b") is None  # progress starts the count anew
    assert failures.add(40, "c") is None
    assert failures.add(None, "d") is None  # the store did not answer
    reason = failures.add(40, "OSError: no space")
    assert reason is not None
    assert "3 attempts in a row committed nothing after step 40" in reason
    assert "OSError: no space" in reason


def test_only_failures_in_a_row_make_the_driver_wait_and_longer_each_time():
    failures = Failures(9, committed=7)
    pauses = []
    for _ in range(7):
        pauses.append(failures.pause_s)
        assert failures.add(7, "x") is None
    assert pauses == [0, 0, 2, 6, 14, 30, 30]
    failures.add(8, "x")
    assert failures.pause_s == 0
