"""What a server file may say."""

from __future__ import annotations

import re

import pytest

from genssl.config.document import parse_document
from genssl.config.limits import COPIES, LimitsConfig
from genssl.config.load import validate
from genssl.config.server import ServerFile, generator_id
from genssl.errors import ConfigError

GENERATORS = "generators:\n- {name: stable_unclip, model: builtin:digits-unclip}\n"


def server(text: str) -> ServerFile:
    return validate(ServerFile, parse_document(text, "s.yaml"))


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        server(text)
    return caught.value.problems


def test_the_defaults_serve_this_machine_only():
    checked = server(GENERATORS)
    assert checked.address == "127.0.0.1:50051"
    assert list(checked.buckets) == sorted(checked.buckets)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:50051", "'[::1]:50051'", "unix:/tmp/genssl.sock"])
def test_an_address_of_this_machine_is_served(address):
    assert server(f"address: {address}\n{GENERATORS}").address == address.strip("'")


@pytest.mark.parametrize(
    "address", ["0.0.0.0:50051", "'[::]:50051'", "192.168.1.2:50051", "example.org:80", "localhost.example.org:80"]
)
def test_an_address_that_others_reach_is_refused(address):
    plain = address.strip("'")
    (problem,) = problems(f"buckets: [1]\naddress: {address}\n{GENERATORS}")
    assert problem.startswith(f"s.yaml:2: address: {plain!r}: ")
    assert "only addresses of this machine can be served" in problem
    assert problem.endswith("to serve others, add one of them, or forward the port through ssh")


@pytest.mark.parametrize("address", ["50051", "localhost", "localhost:http", "unix:"])
def test_what_is_no_address_is_refused(address):
    (problem,) = problems(f"address: '{address}'\n{GENERATORS}")
    assert problem.startswith(f"s.yaml:1: address: {address!r}: ")
    assert "such as" in problem


@pytest.mark.parametrize("buckets", ["[4, 1]", "[1, 4, 4]"])
def test_buckets_ascend(buckets):
    (problem,) = problems(f"buckets: {buckets}\n{GENERATORS}")
    assert problem == f"s.yaml:1: buckets: {buckets}: batch sizes must be in ascending order, each once"


def test_buckets_are_batch_sizes():
    assert problems(f"buckets: [0, 4]\n{GENERATORS}") == [
        "s.yaml:1: buckets.0: 0: input should be greater than or equal to 1"
    ]
    (problem,) = problems(f"buckets: []\n{GENERATORS}")
    assert problem.startswith("s.yaml:1: buckets: ")
    assert server(f"buckets: [2, 8]\n{GENERATORS}").buckets == (2, 8)


def test_two_generators_have_two_ids():
    again = f"{GENERATORS}- {{name: stable_unclip, model: other/model}}\n"
    (problem,) = problems(again)
    assert problem == (
        "s.yaml:1: generators: more than one generator has the id stable_unclip; give each its own `id:`"
    )
    named = f"{GENERATORS}- {{name: stable_unclip, model: other/model, id: other}}\n"
    assert [generator_id(config) for config in server(named).generators] == ["stable_unclip", "other"]
    clash = f"{GENERATORS}- {{name: stable_unclip, model: other/model, id: stable_unclip}}\n"
    assert len(problems(clash)) == 1


def test_a_server_serves_something():
    assert problems("address: localhost:0\n") == ["s.yaml:1: generators: is missing; add it"]
    (problem,) = problems("generators: []\n")
    assert problem.startswith("s.yaml:1: generators: ")


def test_limits_are_checked_with_everything_else():
    text = f"address: 0.0.0.0:1\nlimits:\n  max_image_bytes: 1\n  max_rows: 5\n{GENERATORS}"
    assert [": ".join(line.split(": ")[:2]) for line in problems(text)] == [
        "s.yaml:1: address",
        "s.yaml:3: limits.max_image_bytes",
        "s.yaml:4: limits.max_rows",
    ]


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (
            {"max_message_bytes": 2**28, "max_queued_bytes_per_client": 2**27},
            r"max_message_bytes \(268,435,456\) is more than max_queued_bytes_per_client \(134,217,728\)",
        ),
        (
            {"max_queued_bytes": 2**20, "max_queued_bytes_per_client": 2**20},
            r"max_message_bytes \(33,554,432\) is more than max_queued_bytes",
        ),
        ({"max_memory_bytes": 2**29}, r"leaves 0 bytes for requests and answers beside .*; raise it to"),
        ({"max_queued_bytes": 2**32}, r"which is less than max_queued_bytes \(4,294,967,296\); raise it to"),
        ({"max_connections": 10_000}, r"for 10000 connections of 32 calls"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(limits, says):
    with pytest.raises(ValueError, match=says):
        LimitsConfig(**limits)


def test_the_memory_that_a_refusal_names_is_enough():
    for limits in ({"max_queued_bytes": 2**32}, {"max_connections": 10_000}, {"max_memory_bytes": 2**29}):
        with pytest.raises(ValueError, match="raise it to") as caught:
            LimitsConfig(**limits)
        enough = int(re.search(r"raise it to ([\d,]+)", str(caught.value))[1].replace(",", ""))
        assert LimitsConfig(**limits | {"max_memory_bytes": enough}).most_queued_bytes() >= 256 * 2**20


def test_the_parts_of_the_memory_bound_are_the_whole():
    for limits in (LimitsConfig(), LimitsConfig(max_queued_bytes=2**28), LimitsConfig(max_memory_bytes=2**34)):
        receiving = limits.messages_received_at_once() * limits.max_message_bytes
        assert limits.fixed_bytes() + receiving + COPIES * limits.most_queued_bytes() <= limits.max_memory_bytes
    assert LimitsConfig(max_queued_bytes=2**28).most_queued_bytes() == 2**28
