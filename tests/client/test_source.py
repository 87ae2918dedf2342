"""The remote source against real server processes, through restarts and deaths."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest

from genssl.client.source import RemoteSource
from genssl.config.recipe import VariantsConfig
from genssl.errors import RequestRefusedError, ServerUnavailableError
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest


def open_remote(
    address: str, dataset, ledger: Ledger | None = None, generator_id: str = "stable_unclip", pool=None, **settings
) -> RemoteSource:
    return RemoteSource(
        targets=[address],
        generator_id=generator_id,
        parameters={},
        dataset=dataset,
        config=VariantsConfig(**{"rows_per_request": 16, **settings}),
        ledger=ledger or Ledger(),
        pool=pool,
    )


def requests_for(dataset, rows, index: int = 0) -> list[VariantRequest]:
    return [VariantRequest(row, dataset.source_id(row), index) for row in rows]


@pytest.fixture(scope="module")
def expected(unclip, digits_train):
    """The variants of the first 40 train digits, made in this process."""
    source = InProcessSource(VariantEngine(unclip, [1, 4, 16, 64]), digits_train, Ledger())
    return lambda index: source.take(requests_for(digits_train, range(40), index)).images


def grey_levels_apart(a, b) -> int:
    return int(np.abs(a.astype(int) - b).max())


def test_remote_variants_equal_in_process_ones_and_are_counted(server, digits_train, expected):
    ledger = Ledger()
    source = open_remote(server.address, digits_train, ledger)
    try:
        # An index that no other test asks this server for: it would have been remembered.
        source.announce(requests_for(digits_train, range(40), 9077))
        delivery = source.take(requests_for(digits_train, range(40), 9077))
    finally:
        source.close()
    assert grey_levels_apart(delivery.images, expected(9077)) <= 1
    assert delivery.origins == ["generated"] * 40
    assert ledger.bytes_received == 40 * 3 * 8 * 8
    assert ledger.generator_seconds > 0
    assert ledger.calls >= 3
    assert ledger.retries == 0


def test_a_server_that_stays_away_is_an_error_that_names_it(start_server, tmp_path, digits_train):
    with start_server(tmp_path) as server:
        server.wait_until_serving()
        source = open_remote(server.address, digits_train, deadline_seconds=3)
        try:
            source.take(requests_for(digits_train, range(4)))
            server.stop(signal.SIGKILL)
            started = time.monotonic()
            with pytest.raises(ServerUnavailableError) as caught:
                source.take(requests_for(digits_train, range(4), 1))
            assert time.monotonic() - started < 15
        finally:
            source.close()
    assert server.address in str(caught.value)
    assert "genssl serve-generator FILE" in str(caught.value)


def test_an_unknown_generator_is_refused_with_the_names_there_are(server, digits_train):
    with pytest.raises(RequestRefusedError, match=r"has no generator 'unclip'.*allowed: stable_unclip"):
        open_remote(server.address, digits_train, generator_id="unclip")


def test_a_message_over_the_limit_is_cut_and_not_retried(start_server, tmp_path):
    """Noisy photos of 50 KB exceed a limit of 256 KiB together; they go in messages that fit."""
    from PIL import Image

    from genssl.data.configs import FolderConfig
    from genssl.data.folder import ImageFolder

    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for number in range(14):
        pixels = random.integers(0, 256, (130, 130, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number:02d}.png")
    dataset = ImageFolder(FolderConfig(root=photos, labels="none", image_size=8, test_fraction=0.1), "train")
    ledger = Ledger()
    with start_server(tmp_path, "limits.max_message_bytes=262144") as server:
        server.wait_until_serving()
        source = open_remote(server.address, dataset, ledger)
        try:
            delivery = source.take(requests_for(dataset, range(len(dataset))))
        finally:
            source.close()
    assert len(delivery.images) == len(dataset) > 8
    assert ledger.retries == 0
    assert ledger.calls > 2


def test_an_image_over_the_limit_is_refused_with_its_row(server, tmp_path):
    from genssl.data.base import StoredImage

    class Huge:
        def stored(self, row: int) -> StoredImage:
            return StoredImage(bytes(17 * 2**20), "file")

    source = open_remote(server.address, Huge())
    try:
        with pytest.raises(
            RequestRefusedError, match=r"the image in row 3 has 17,825,792 bytes; .* takes at most 16,777,216"
        ):
            source.take([VariantRequest(3, bytes(16), 0)])
    finally:
        source.close()
