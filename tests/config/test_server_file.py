"""What a server file may say."""

from __future__ import annotations

import re

import pytest

from genssl.config.documents.document import parse_document
from genssl.config.limits import COPIES, LimitsConfig
from genssl.config.server import ServerFile, generator_id
from genssl.config.validate import validate
from genssl.errors import ConfigError

GENERATORS = "generators:\n- {name: stable_unclip, model: builtin:digits-unclip}\n"


def server(text: str) -> ServerFile:
    return validate(ServerFile, parse_document(text, "s.yaml"))


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        server(text)
    return caught.value.problems


@pytest.mark.parametrize(
    ("generator", "warned"),
    [
        (
            "{name: stable_unclip, model: m, num_inference_steps: [4, 9], guidance_start: [0.0, 0.5]}",
            "num_inference_steps",
        ),
        ("{name: icgan, model: m, best_of: [1, 8], truncation: [0.3, 1]}", "best_of"),
        ("{name: stable_unclip, model: m, guidance_scale: [2, 9], noise_level: adaptive}", None),
    ],
)
def test_what_varies_and_splits_batches_is_a_warning(generator, warned):
    found = server(f"generators:\n- {generator}\n").warnings()
    if warned is None:
        assert found == []
    else:
        assert found[0].startswith(
            f"generators.0.{warned} varies between variants, and only those of one value can share"
        )
        assert len(found) == 1


def test_a_token_is_granted_its_highest_class():
    tokens = "tokens: [{name: a, env: A}, {name: b, env: B, highest_priority: interactive}]\n"
    assert [token.highest_priority for token in server(tokens + GENERATORS).tokens] == ["training", "interactive"]
    (problem,) = problems(f"tokens: [{{name: a, env: A, highest_priority: urgent}}]\n{GENERATORS}")
    assert "tokens.0.highest_priority" in problem


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


def limits(text: str) -> dict[str, int]:
    return server(f"{GENERATORS}limits: {{{text}}}\n").limits.model_dump()


def test_a_limit_that_the_file_does_not_give_follows_a_lower_one():
    default = limits("")
    assert limits("max_message_bytes: 1048576") == default | {
        "max_message_bytes": 2**20,
        "max_image_bytes": 2**20 - 2**16,
    }
    assert limits("max_queued_variants: 16") == default | {
        "max_queued_variants": 16,
        "max_queued_variants_per_client": 16,
        "max_variants_per_request": 16,
    }
    assert limits("max_queued_bytes: 1048576, max_image_bytes: 1024") == default | {
        "max_queued_bytes": 2**20,
        "max_queued_bytes_per_client": 2**20,
        "max_message_bytes": 2**20,
        "max_image_bytes": 1024,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "max_image_bytes: 67108864",
            "max_image_bytes is 67,108,864, but max_message_bytes allows 33,554,432, its default less 65,536 for the "
            "rest of a message: raise max_message_bytes to 67174400 or more, or lower max_image_bytes to 33488896",
        ),
        (
            "max_image_bytes: 1048576, max_message_bytes: 1048576",
            "max_image_bytes is 1,048,576, but max_message_bytes allows 1,048,576 less 65,536",
        ),
        (
            "max_message_bytes: 1048577, max_queued_bytes_per_client: 1048576",
            "raise max_queued_bytes_per_client to 1048577 or more, or lower max_message_bytes to 1048576",
        ),
        (
            "max_queued_bytes_per_client: 1048577, max_queued_bytes: 1048576",
            "raise max_queued_bytes to 1048577 or more",
        ),
        (
            "max_variants_per_request: 9, max_queued_variants_per_client: 8",
            "raise max_queued_variants_per_client to 9 or more, or lower max_variants_per_request to 8",
        ),
        ("max_queued_variants_per_client: 9, max_queued_variants: 8", "raise max_queued_variants to 9 or more"),
        (
            "max_variants_per_request: 20, max_queued_variants: 16",
            "max_variants_per_request is 20, but max_queued_variants allows 16: raise max_queued_variants to 20",
        ),
        (
            "max_message_bytes: 65536",
            "max_message_bytes is 65,536, too little for any max_image_bytes; raise it to 66560",
        ),
    ],
)
def test_limits_that_contradict_each_other_are_refused_with_what_to_change(text, words):
    (problem,) = problems(f"{GENERATORS}limits: {{{text}}}\n")
    assert problem.startswith("s.yaml:3: limits: ")
    assert words in problem


def test_all_contradictions_are_told_at_once():
    (problem,) = problems(
        f"{GENERATORS}limits: {{max_image_bytes: 70000000, max_queued_variants_per_client: 9, max_queued_variants: 8}}"
    )
    assert "raise max_message_bytes" in problem
    assert "raise max_queued_variants to 9" in problem


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_memory_bytes": 2**29}, r"leaves 0 bytes for requests and answers beside .*; raise it to"),
        ({"max_queued_bytes": 2**32}, r"which is less than max_queued_bytes \(4,294,967,296\); raise it to"),
        ({"max_connections": 10_000}, r"for 10000 connections of 32 calls"),
    ],
)
def test_limits_beyond_the_memory_bound_are_refused(limits, says):
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
