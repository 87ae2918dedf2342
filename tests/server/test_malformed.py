"""Two hundred malformed requests: each gets a status that says what is wrong, and the server goes on serving."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from genssl.data.base import StoredImage, raw_image
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc

GENERATE = "/genssl.generation.v1.GenerationService/GenerateVariants"
MOST_VARIANTS = 64  # of the fixture's server
MOST_PIXELS = 10_000
MOST_IMAGE_BYTES = 16 * 2**20
MEMORY_BYTES = 300 * 2**20

Draws = np.random.Generator
Item = pb.ItemCode
Code = grpc.StatusCode


@dataclass
class Bad:
    """A request, or raw bytes in its place, and what it must get: a status, or an item code for each variant."""

    request: pb.GenerateVariantsRequest | bytes
    expected: grpc.StatusCode | int
    says: str


def picture(draws: Draws, side: int = 16) -> np.ndarray:
    return draws.integers(0, 256, (3, side, side), dtype=np.uint8)


def file_of(draws: Draws, kind: str, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(draws, side).transpose(1, 2, 0)).save(buffer, format=kind)
    return buffer.getvalue()


def source(data: bytes, *, digest: bytes | None = None) -> pb.SourceImage:
    name = StoredImage(data, "file").source_id if digest is None else digest
    return pb.SourceImage(digest=name, data=data, encoding=pb.IMAGE_ENCODING_FILE)


def raw_source(draws: Draws, **shape: int) -> pb.SourceImage:
    stored = raw_image(picture(draws))
    claimed = {"channels": 3, "height": 16, "width": 16} | shape
    named = StoredImage(stored.data, "raw", **claimed).source_id
    return pb.SourceImage(digest=named, data=stored.data, encoding=pb.IMAGE_ENCODING_RAW, **claimed)


def request(sources: list[pb.SourceImage], variants: int = 1, **fields: object) -> pb.GenerateVariantsRequest:
    specs = fields.pop("specs", [pb.VariantSpec(variant_index=number) for number in range(variants)])
    return pb.GenerateVariantsRequest(
        **{"generator_id": "stable_unclip", "sources": sources, "variants": specs} | fields
    )


def good(draws: Draws, **fields: object) -> pb.GenerateVariantsRequest:
    return request([raw_source(draws)], **fields)


def png_bomb(draws: Draws) -> bytes:
    """A PNG of a few hundred bytes that says it has billions of pixels."""
    side = int(draws.integers(20_000, 60_000))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def truncated(draws: Draws) -> bytes:
    whole = file_of(draws, str(draws.choice(["PNG", "JPEG", "WEBP", "BMP", "TIFF"])))
    return whole[: int(draws.integers(len(whole) // 4, len(whole) * 3 // 4))]


def foreign(draws: Draws) -> bytes:
    return [
        lambda: file_of(draws, "GIF"),
        lambda: file_of(draws, "PPM"),
        lambda: b"%PDF-1.7\n" + draws.bytes(200),
        lambda: pickle.dumps({"weights": [1, 2, 3]}),
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ][int(draws.integers(5))]()


def other_bits(data: bytes, draws: Draws) -> bytes:
    place = int(draws.integers(len(data)))
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


KINDS: dict[str, Callable[[Draws], Bad]] = {
    "bomb": lambda d: Bad(request([source(png_bomb(d))]), Item.ITEM_CODE_BAD_IMAGE, "the limit of 10,000"),
    "truncated": lambda d: Bad(request([source(truncated(d))]), Item.ITEM_CODE_BAD_IMAGE, ""),
    "foreign": lambda d: Bad(request([source(foreign(d))]), Item.ITEM_CODE_BAD_IMAGE, "JPEG"),
    "too many pixels": lambda d: Bad(
        request([source(file_of(d, "PNG", 120))]), Item.ITEM_CODE_BAD_IMAGE, "120 x 120 pixels"
    ),
    "too many bytes": lambda d: Bad(
        request([source(bytes(MOST_IMAGE_BYTES + int(d.integers(1, 9))))]), Item.ITEM_CODE_BAD_IMAGE, "bytes; the limit"
    ),
    "wrong digest": lambda d: Bad(
        request([source(file_of(d, "PNG"), digest=d.bytes(16))]), Item.ITEM_CODE_DIGEST_MISMATCH, "not"
    ),
    "digest of another image": lambda d: Bad(
        request([source(data := file_of(d, "PNG"), digest=StoredImage(other_bits(data, d), "file").source_id)]),
        Item.ITEM_CODE_DIGEST_MISMATCH,
        "digest",
    ),
    "digest of wrong length": lambda d: Bad(
        request([source(file_of(d, "PNG"), digest=d.bytes(int(d.choice([0, 1, 15, 17, 64]))))]),
        Item.ITEM_CODE_DIGEST_MISMATCH,
        "16 bytes",
    ),
    "raw of a wrong shape": lambda d: Bad(
        request([raw_source(d, width=int(d.integers(17, 2**31)))]), Item.ITEM_CODE_BAD_IMAGE, ""
    ),
    "raw of wrong channels": lambda d: Bad(
        request([raw_source(d, channels=int(d.choice([0, 2, 4, 2**31])))]),
        Item.ITEM_CODE_BAD_IMAGE,
        "1 or 3, height, width",
    ),
    "unknown encoding": lambda d: Bad(
        request([pb.SourceImage(digest=d.bytes(16), data=d.bytes(9), encoding=int(d.integers(3, 99)))]),
        Item.ITEM_CODE_BAD_IMAGE,
        "encoding must be",
    ),
    "no variants": lambda d: Bad(good(d, variants=0), Code.INVALID_ARGUMENT, "asks for 0 variants; 1 to 64"),
    "absurd count": lambda d: Bad(
        good(d, variants=int(d.integers(MOST_VARIANTS + 1, 50_000))), Code.INVALID_ARGUMENT, "1 to 64 are allowed"
    ),
    "more sources than variants": lambda d: Bad(
        request([raw_source(d) for _ in range(int(d.integers(2, 9)))]), Code.INVALID_ARGUMENT, "sources for 1"
    ),
    "source that is not there": lambda d: Bad(
        good(d, specs=[pb.VariantSpec(source_index=int(d.integers(1, 2**32)))]), Item.ITEM_CODE_BAD_SPEC, "source_index"
    ),
    "unknown parameter": lambda d: Bad(
        good(d, parameters={f"p{d.integers(99)}": 1.0}), Code.INVALID_ARGUMENT, "has no parameter"
    ),
    "absurd parameter": lambda d: Bad(
        good(
            d,
            parameters={
                str(d.choice(["num_inference_steps", "image_size", "output_size", "noise_level"])): float(
                    d.choice([-1, 0.5, 1e9, 1e300, float("nan"), float("inf"), -float("inf")])
                )
            },
        ),
        Code.INVALID_ARGUMENT,
        "",
    ),
    "absurd parameter of a row": lambda d: Bad(
        good(d, specs=[pb.VariantSpec(parameters={"noise_level": float(d.choice([-5, 1e12, float("nan")]))})]),
        Item.ITEM_CODE_BAD_SPEC,
        "noise_level",
    ),
    "absurd priority": lambda d: Bad(good(d, priority=int(d.integers(4, 99))), Code.INVALID_ARGUMENT, "priority"),
    "unknown output": lambda d: Bad(
        good(d, output=pb.OutputSpec(encoding=int(d.choice([2, 7])))), Code.INVALID_ARGUMENT, "output.encoding"
    ),
    "unknown generator": lambda d: Bad(
        good(d, generator_id=f"g{d.integers(99)}"), Code.NOT_FOUND, "allowed: stable_unclip"
    ),
    "another fingerprint": lambda d: Bad(
        good(d, expected_fingerprint=d.bytes(16)), Code.FAILED_PRECONDITION, "fingerprint"
    ),
    "variants of absurd size": lambda d: Bad(
        good(
            d,
            variants=MOST_VARIANTS,
            specs=[pb.VariantSpec(parameters={str(d.choice(["output_size", "image_size"])): 2048.0})],
        ),
        Item.ITEM_CODE_BAD_SPEC,
        "at most 32 is allowed",
    ),
    "oversized message": lambda d: Bad(
        good(d, request_id="x" * (32 * 2**20 + int(d.integers(99)))), Code.RESOURCE_EXHAUSTED, "larger than max"
    ),
    "no protobuf": lambda d: Bad(b"\xff" * int(d.integers(1, 999)), Code.INVALID_ARGUMENT, "not the protocol buffer"),
}


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_two_hundred_malformed_requests_get_specific_errors_and_the_server_goes_on(server):
    draws = np.random.default_rng(5)
    per_kind = 200 // len(KINDS)
    assert per_kind * len(KINDS) == 200
    with grpc.insecure_channel(
        server.address, options=[("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
    ) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        untyped = channel.unary_unary(GENERATE)
        before = resident_bytes(server.process.pid)
        for number in range(per_kind):
            for kind, make in KINDS.items():
                bad = make(draws)
                where = f"{kind}, number {number}"
                if isinstance(bad.expected, grpc.StatusCode):
                    call = untyped if isinstance(bad.request, bytes) else stub.GenerateVariants
                    with pytest.raises(grpc.RpcError) as caught:
                        call(bad.request, timeout=30)
                    assert caught.value.code() == bad.expected, (where, caught.value.details())
                    said = caught.value.details()
                else:
                    (variant,) = stub.GenerateVariants(bad.request, timeout=30).variants
                    assert variant.status.code == bad.expected, (where, variant.status.message)
                    assert not variant.data
                    said = variant.status.message
                assert bad.says in said, (where, said)
                assert "Traceback" not in said
                assert "/genssl/" not in said, "no paths of the server"
        (served,) = stub.GenerateVariants(good(draws), timeout=30).variants
        assert served.status.code == pb.ITEM_CODE_OK
        assert resident_bytes(server.process.pid) - before < MEMORY_BYTES
        counted = stub.GetStatistics(pb.GetStatisticsRequest()).rejections
    assert counted["bad_image"] >= 8 * per_kind
    assert counted["too_large"] >= 2 * per_kind
    assert "Traceback" not in server.log_path.read_text()
