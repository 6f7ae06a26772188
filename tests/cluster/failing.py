"""Commands that must fail, and how."""

from cluster.cli import main


def fails(capsys, arguments, code, *parts):
    """Run a command that must fail with `code` and a message that holds `parts`."""
    capsys.readouterr()
    try:
        got = main([str(word) for word in arguments])
    except SystemExit as stop:  # tyro ends the process for a wrong option
        got = stop.code
    captured = capsys.readouterr()
    words = " ".join((captured.err + captured.out).replace("│", " ").split())
    assert got == code, words
    for part in parts:
        assert part in words
    assert "Traceback" not in words
