"""The command, against a real gRPC server on a thread of this process."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster import embedded
from cluster.cli.app import easel
from cluster.cli.failure import error_lines, exit_code
from cluster.cli.live import Canvas, printable
from cluster.client import Accepted, Committed, Draft
from cluster.core import Violation
from cluster.errors import (
    CheckpointError,
    DeadlineExceeded,
    InvalidRequest,
    JobFailed,
    JobNotFound,
    QueueFull,
    ReplicaNotFound,
    StartupError,
    TransitionError,
    Unavailable,
)
from cluster.rpc import convert
from cluster.rpc.easel.v1 import jobs_pb2
from tests.unit.commands import at, invoke, local_cluster
from tests.unit.fake_router import IMAGE_TOKEN, PATIENCE_S, Served
from tests.unit.images import picture

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("no_local_cluster")


def test_generate_prints_just_the_text_into_a_pipe(served: Served) -> None:
    result = at(served, "generate", "hello")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "olleh\n", "")


def test_generate_json_prints_exactly_one_object(served: Served) -> None:
    result = at(served, "generate", "hello", "--json", "--seed", "5", "--request-id", "mine")
    answer = json.loads(result.stdout)
    assert list(answer) == ["job_id", "text", "finish_reason", "usage", "model", "replica", "seed"]
    assert (answer["job_id"], answer["text"], answer["seed"]) == ("mine", "olleh", 5)
    assert answer["finish_reason"] == "eos"
    assert answer["usage"]["denoising_steps"] == 7


def test_images_come_before_the_prompt_and_are_named_as_options(served: Served, tmp_path: Path) -> None:
    files = [tmp_path / "one.png", tmp_path / "two.webp"]
    for file, kind in zip(files, ("PNG", "WEBP"), strict=True):
        file.write_bytes(picture(kind))
    images = ("--image", str(files[0]), "--image", str(files[1]))
    for command in ("generate", "submit"):
        assert at(served, command, "hi", *images, "--request-id", command).exit_code == 0
        parsed = served.router.parsed[command]
        assert [image.mime_type for image in parsed.images] == ["image/png", "image/webp"]
        assert parsed.spec.prompt_tokens == (2, IMAGE_TOKEN, IMAGE_TOKEN, ord("h"), ord("i"))
    files[1].write_bytes(b"GIF89a")
    result = at(served, "generate", "hi", *images)
    assert result.exit_code == 2
    assert result.stderr.startswith("easel: error: --image[1]: begins with b'GIF89a', which no known kind does")
    result = at(served, "generate", "hi", "--image", str(tmp_path / "no.png"))
    assert result.exit_code == 2
    assert "--image[0]: is '" in result.stderr


def test_generate_reads_standard_input(served: Served) -> None:
    assert at(served, "generate", "-", stdin="abc\n").stdout == "cba\n"


def test_standard_input_that_is_not_utf8_is_refused(served: Served) -> None:
    result = at(served, "generate", "-", stdin=b"a\xff")
    assert result.exit_code == 2
    assert result.stderr == "easel: error: prompt: is 'a\\udcff'; text must be valid Unicode\n"


def test_every_option_of_generate_reaches_the_router(served: Served) -> None:
    result = at(
        served,
        *("generate", "hello", "--request-id", "x", "--max-new-tokens", "9", "--max-denoising-steps", "7"),
        *("--entropy-bound", "0.5", "--t-min", "0.1", "--t-max", "0.2", "--confidence-threshold", "0.3"),
        *("--stability-threshold", "4", "--stop", "one", "--stop", "two", "--priority", "urgent"),
        *("--tenant", "shop", "--timeout-s", "9.5", "--no-drafts", "--seed", "3"),
    )
    assert result.exit_code == 0
    parsed = served.router.parsed["x"]
    assert parsed.spec.stop == ("one", "two")
    assert parsed.spec.priority.name == "URGENT"
    assert parsed.spec.tenant == "shop"
    assert parsed.timeout_ms == 9500
    sampling = parsed.spec.sampling
    assert (sampling.seed, sampling.max_new_tokens, sampling.max_denoising_steps) == (3, 9, 7)


def test_a_bad_request_is_one_line_a_field_and_exit_2(served: Served) -> None:
    result = at(served, "generate", " ", "--t-min", "0", "--stop", "")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "easel: error: prompt: is ' '; a prompt must hold something besides white space",
        "easel: error: --t-min: is 0; allowed is above 0 up to 100",
        "easel: error: --stop[0]: is 0 characters long; allowed are 1 to 256",
    ]


def test_no_cluster_is_exit_3_with_what_to_do() -> None:
    result = invoke("status", "--address", "127.0.0.1:1")
    assert result.exit_code == 3
    assert result.stderr.splitlines() == [
        "easel: error: no cluster answers at 127.0.0.1:1",
        "easel: start one with `easel up`, or name another with --address host:port",
    ]


def test_a_cancelled_job_is_exit_4(served: Served) -> None:
    result = at(served, "generate", "!cancelled")
    assert result.exit_code == 4
    assert result.stderr == "easel: error: job x was cancelled\n"


def test_a_server_bug_is_exit_1_without_a_trace(served: Served) -> None:
    result = at(served, "generate", "!bug")
    assert result.exit_code == 1
    assert result.stderr.startswith("easel: error: an unexpected error, ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest([Violation("text", "is bad")]), 2),
        (Unavailable("x"), 3),
        (QueueFull("x"), 3),
        (DeadlineExceeded("x"), 4),
        (JobFailed("x"), 4),
        (JobNotFound("x"), 1),
        (ReplicaNotFound("x"), 1),
        (TransitionError("x"), 1),
        (CheckpointError("x"), 1),
    ],
)
def test_exit_codes_are_those_of_the_help_text(error: Exception, code: int) -> None:
    assert exit_code(error) == code  # type: ignore[arg-type]  # all are EaselErrors


def test_an_error_of_several_lines_keeps_them() -> None:
    assert error_lines(StartupError("one\ntwo")) == ["one", "two"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "x", "--seed", "many"),
        ("generate", "x", "--priority", "vip"),
        ("status", "--address", "somewhere"),
        ("status", "--address", "here:1,there"),
        ("drain", "r0", "--timeout", "0"),
        ("jobs", "--state", "lost"),
        ("up", "--port", "99999"),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_exit_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_submit_prints_the_job_id_and_get_shows_the_job(served: Served) -> None:
    assert at(served, "submit", "hello", "--request-id", "a").stdout == "a\n"
    assert json.loads(at(served, "submit", "hello", "--request-id", "b", "--json").stdout)["job_id"] == "b"
    shown = at(served, "get", "a").stdout
    assert "state     succeeded\n" in shown
    assert shown.endswith("\nolleh\n")
    job = json.loads(at(served, "get", "a", "--json").stdout)
    assert (job["state"], job["priority"], job["finish_reason"]) == ("succeeded", "normal", "eos")
    assert (job["text"], job["error"], job["created_at"]) == ("olleh", None, "2023-11-14T22:13:20.123000+00:00")


def test_an_unknown_job_is_an_error_line(served: Served) -> None:
    result = at(served, "get", "nope")
    assert (result.exit_code, result.stderr) == (1, "easel: error: no job has the id 'nope'\n")
    result = at(served, "get", "bad id")
    assert result.exit_code == 2
    assert result.stderr.startswith("easel: error: job id: is 'bad id'")
    result = at(served, "get", "a\udcff")
    assert (result.exit_code, result.stderr) == (2, "easel: error: job id: is 'a\\udcff'; text must be valid Unicode\n")


def test_get_shows_the_attempts_that_ended_early(served: Served) -> None:
    attempt = jobs_pb2.JobAttempt(replica="r1", reason="REPLICA_LOST", message="its stream\nbroke", epoch=1)
    attempt.started_at.CopyFrom(convert.timestamp_to_proto(1_700_000_000_000))
    attempt.ended_at.CopyFrom(convert.timestamp_to_proto(1_700_000_000_812))
    served.router.history.append(attempt)
    at(served, "submit", "hello", "--request-id", "a")
    shown = at(served, "get", "a").stdout.splitlines()
    assert "attempt 1 on r1: REPLICA_LOST, after 812 ms: its stream broke" in shown
    job = json.loads(at(served, "get", "a", "--json").stdout)
    assert job["losses"] == 1
    assert job["history"] == [
        {
            "epoch": 1,
            "replica": "r1",
            "reason": "REPLICA_LOST",
            "message": "its stream\nbroke",
            "started_at": "2023-11-14T22:13:20+00:00",
            "ended_at": "2023-11-14T22:13:20.812000+00:00",
        }
    ]


def test_watch_prints_the_text_from_a_canvas_on(served: Served) -> None:
    at(served, "submit", "hello", "--request-id", "a")
    assert at(served, "watch", "a").stdout == "olleh\n"
    assert at(served, "watch", "a", "--from-canvas", "1").stdout == "leh\n"


@pytest.mark.parametrize(
    ("offset", "allowed"),
    [("3", "0 to 2: the job has ended with 2 canvases"), ("-1", "0 to 2147483647"), ("9999999999", "0 to 2147483647")],
)
def test_watch_from_beyond_the_end_is_one_line_and_exit_2(served: Served, offset: str, allowed: str) -> None:
    at(served, "submit", "hello", "--request-id", "a")
    result = at(served, "watch", "a", "--from-canvas", offset)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"easel: error: --from-canvas: is {offset}; allowed is {allowed}\n"


def test_cancel_says_how_the_job_stands(served: Served) -> None:
    at(served, "submit", "hello", "--request-id", "a")
    assert at(served, "cancel", "a").stdout == "a cancelled\n"
    assert served.router.cancelled == ["a"]


def test_cancel_of_a_job_that_has_ended_is_one_line_and_exit_1(served: Served) -> None:
    at(served, "submit", "hello", "--request-id", "a")
    served.router.ended.add("a")
    result = at(served, "cancel", "a")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "easel: error: job a cannot be cancelled: it has succeeded already\n"


def test_jobs_lists_over_pages_up_to_the_limit(served: Served) -> None:
    assert at(served, "jobs").stdout == "no jobs\n"
    for name in ("a", "b", "c"):
        at(served, "submit", "hello", "--request-id", name)
    lines = at(served, "jobs").stdout.splitlines()
    assert lines[0].split()[:3] == ["job", "state", "priority"]
    assert [line.split()[0] for line in lines[1:]] == ["a", "b", "c"]
    listed = json.loads(at(served, "jobs", "--limit", "2", "--json", "--state", "succeeded").stdout)
    assert [job["job_id"] for job in listed] == ["a", "b"]


def test_the_address_comes_from_the_option_the_environment_or_the_local_cluster(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "current", lambda: local_cluster(served.address))
    assert invoke("generate", "ab").stdout == "ba\n"
    monkeypatch.setenv("EASEL_ADDRESS", "127.0.0.1:1")
    assert invoke("generate", "ab").exit_code == 3
    assert at(served, "generate", "ab").stdout == "ba\n"


def test_help_and_version_need_no_cluster() -> None:
    assert "Start here:" in invoke("--help").stdout
    assert invoke("--version").stdout.startswith("easel 0.")
    for name in easel.commands:
        assert invoke(name, "--help").exit_code == 0


def test_a_terminal_shows_the_draft_and_then_the_answer(served: Served) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cluster.cli", "generate", "hello", "--address", served.address]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    assert process.wait(PATIENCE_S) == 0
    assert "olleh" in shown
    assert "7 steps" in shown


def test_ctrl_c_cancels_the_job_and_leaves_no_trace(served: Served) -> None:
    command = [sys.executable, "-m", "cluster.cli", "generate", "!hang", "--request-id", "held"]
    process = subprocess.Popen(
        [*command, "--address", served.address], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(1000):
        if served.router.hanging.is_set():
            break
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stdout, stderr) == (130, b"", b"")
    assert served.router.cancelled == ["held"]


def read_terminal(descriptor: int) -> str:
    """Everything until the other end closes, which Linux reports as an error."""
    pieces: list[bytes] = []
    while True:
        try:
            piece = os.read(descriptor, 4096)
        except OSError:
            piece = b""
        if not piece:
            os.close(descriptor)
            return b"".join(pieces).decode()
        pieces.append(piece)


def test_a_canvas_shows_committed_text_solid_and_the_draft_dim() -> None:
    canvas = Canvas()
    canvas.apply(Accepted("j", 3, "m", 1, joined=False))
    assert "waiting for a slot" in canvas.footer().plain
    canvas.apply(Committed(0, "one ", (1,), 4, 0.1))
    canvas.apply(Draft(1, 2, "tw\x1b[", 0.5, 3, "r0"))
    assert canvas.body().plain == "one tw·["
    assert [(span.start, span.style) for span in canvas.body().spans] == [(4, "dim")]
    assert canvas.footer().plain == "canvas 1 · step 2 · entropy 0.500 nats · 3 accepted · r0"
    canvas.apply(Committed(1, "two", (1,), 4, 0.1))
    assert canvas.body().plain == "one two"


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b]0;x\x07\nb\r") == "a·]0;x·\nb·"
