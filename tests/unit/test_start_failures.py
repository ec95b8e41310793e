"""What is told of a replica that Serve cannot start: the line of the error, out of Serve's whole message."""

from __future__ import annotations

import pytest

from deployments import start_failures
from deployments.start_failures import failing, reason

MESSAGE = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:easel:Denoiser.initialize() (pid=7)
  File "ranks.py", line 87, in _check
    raise EngineError(said)
cluster.errors.EngineError: rank 1: Easel is 9.9.9 on its node 10.0.0.2 and 0.1.0 on that of rank 0
"""


def test_the_reason_is_the_line_of_our_own_error() -> None:
    assert reason(MESSAGE) == "EngineError: rank 1: Easel is 9.9.9 on its node 10.0.0.2 and 0.1.0 on that of rank 0"


def test_without_an_error_of_ours_it_is_the_last_line() -> None:
    assert reason("one\n  two\n\n") == "two"
    assert reason("") == "Serve could not deploy"


@pytest.mark.parametrize(
    ("said", "lines"),
    [
        ({"Denoiser": MESSAGE}, (f"replicas do not start: {reason(MESSAGE)}",)),
        ({"Denoiser": "Waiting for 1 replica"}, ()),
        ({"Router": MESSAGE}, ()),
        ({}, ()),
    ],
)
def test_a_line_tells_of_replicas_that_failed_and_not_of_those_on_their_way(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], lines: tuple[str, ...]
) -> None:
    monkeypatch.setattr(start_failures, "messages", lambda app_name: said)
    assert failing("easel") == lines
