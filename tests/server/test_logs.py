"""The two forms of the log."""

from __future__ import annotations

import io
import json
import logging
from datetime import datetime

import pytest

from genssl.errors import UserError
from genssl.server.logs import set_up_logging

log = logging.getLogger("genssl.server.test")


@pytest.fixture
def stream(monkeypatch):
    """A stream to log to; the process's own set-up is put back afterwards."""
    monkeypatch.delenv("GENSSL_LOG_LEVEL", raising=False)
    root, ours = logging.getLogger(), logging.getLogger("genssl")
    before = root.handlers[:], root.level, ours.level
    yield io.StringIO()
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_people_read_lines(stream):
    set_up_logging("human", stream)
    log.info("listening on %s", "127.0.0.1:50051")
    when, _, rest = stream.getvalue().partition(" INFO ")
    datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f")
    assert rest == "listening on 127.0.0.1:50051\n"


def test_machines_read_one_object_a_line(stream):
    set_up_logging("json", stream)
    log.warning(
        "made %d",
        3,
        extra={
            "request_id": "r1",
            "client": "a\nb",
            "generator": "digits",
            "variants": 3,
            "wait_ms": 1.23456,
            "generate_ms": 20.0,
        },
    )
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert datetime.fromisoformat(entry.pop("time")).utcoffset().total_seconds() == 0
    assert entry == {
        "level": "warning",
        "logger": "genssl.server.test",
        "message": "made 3",
        "request_id": "r1",
        "client": "a\nb",
        "generator": "digits",
        "variants": 3,
        "wait_ms": 1.235,
        "generate_ms": 20.0,
    }


@pytest.mark.parametrize("kind", ["human", "json"])
def test_tokens_and_images_do_not_get_in_as_extras(stream, kind):
    set_up_logging(kind, stream)
    log.info("x", extra={"token": "secret-token", "data": b"pixels", "client": b"pixels", "request_id": "y" * 5000})
    text = stream.getvalue()
    assert "secret-token" not in text
    assert "pixels" not in text
    assert len(text) < 600
    assert "y" * 256 in text


def test_a_clients_name_cannot_forge_a_line(stream):
    set_up_logging("human", stream)
    log.info("done", extra={"client": "me\n2026-01-01 00:00:00,000 ERROR \x1b[31mthe disk is full"})
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


def test_a_traceback_is_one_field(stream):
    set_up_logging("json", stream)
    try:
        raise ValueError("of this kind")
    except ValueError:
        log.exception("failed")
    entry = json.loads(stream.getvalue())
    assert entry["message"] == "failed"
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("ValueError: of this kind")


@pytest.mark.parametrize(
    ("level", "seen"),
    [
        (None, ["ours info", "theirs info"]),
        ("debug", ["ours debug", "ours info", "theirs info"]),
        ("WARNING", []),
    ],
)
def test_the_level_is_ours_to_choose(stream, monkeypatch, level, seen):
    if level:
        monkeypatch.setenv("GENSSL_LOG_LEVEL", level)
    set_up_logging("json", stream)
    log.debug("ours debug")
    log.info("ours info")
    logging.getLogger("other.library").debug("theirs debug")
    logging.getLogger("other.library").info("theirs info")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == seen


def test_an_unknown_level_is_a_users_error(monkeypatch):
    monkeypatch.setenv("GENSSL_LOG_LEVEL", "debgu")
    with pytest.raises(UserError, match=r"GENSSL_LOG_LEVEL: 'debgu' is not a level; did you mean 'debug'\?"):
        set_up_logging("human")
