"""The server file: what `genssl serve-generator` hosts, where, and within which limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, field_validator

from genssl.config.address import check_address, is_local
from genssl.config.base import BUCKETS, Buckets, ComponentConfig, Kind, Section


class LimitsConfig(Section):
    """What one request may ask for; advertised by GetServerInfo and checked before anything is decoded."""

    max_variants_per_request: int = Field(1024, ge=1)
    max_message_bytes: int = Field(32 * 2**20, ge=2**16)
    max_image_bytes: int = Field(16 * 2**20, ge=2**10)
    max_image_pixels: int = Field(16_000_000, ge=64)
    max_queued_variants: int = Field(
        16384, ge=1, description="rows waiting in the server; more are refused with RESOURCE_EXHAUSTED"
    )


class ServerFile(Section):
    """One server process: one device, one or more generators."""

    address: str = Field("127.0.0.1:50051", description="host:port (port 0: any free one) or unix:/path")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="torch threads on CPU")
    buckets: Buckets = Field(
        BUCKETS, description="batch sizes that the device computes; smaller batches are padded up to the next one"
    )
    embedding_cache: int = Field(100_000, ge=0, description="source embeddings kept in memory")
    drain_seconds: float = Field(
        10.0, ge=0, description="after SIGTERM, how long requests under way may take to finish"
    )
    limits: LimitsConfig = LimitsConfig()
    generators: Annotated[list[SerializeAsAny[ComponentConfig]], Kind("generators")] = Field(min_length=1)

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        check_address(value)
        if not is_local(value):
            raise ValueError(
                "only addresses of this machine can be served (127.0.0.1, localhost, [::1] or unix:/path), "
                "since anyone who reaches the port could use the device; to serve others, forward the port through ssh"
            )
        return value

    @field_validator("generators")
    @classmethod
    def _one_id_each(cls, value: list[ComponentConfig]) -> list[ComponentConfig]:
        ids = [generator_id(config) for config in value]
        if twice := sorted({id for id in ids if ids.count(id) > 1}):
            raise ValueError(f"more than one generator has the id {', '.join(twice)}; give each its own `id:`")
        return value


def generator_id(config: ComponentConfig) -> str:
    """Returns the name by which clients ask for this generator: its `id`, or its registry name."""
    return getattr(config, "id", None) or config.name
