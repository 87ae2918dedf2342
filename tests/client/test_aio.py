"""The clients for other people's trainers, against real server processes."""

from __future__ import annotations

import asyncio
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import trustme
from PIL import Image
from stub_server import GREY, stub_server

import genssl
from genssl import AsyncVariantClient, VariantClient
from genssl.client.images import stored_image, wanted_variants
from genssl.client.server_state import Window
from genssl.config.recipe import ClientTLSConfig
from genssl.errors import DataError, RequestRefusedError, ServerUnavailableError, UserError
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.prefetch import loop as background
from genssl.variants.source import VariantRequest


@pytest.fixture(scope="module")
def expected(unclip, digits_train):
    """The variants of the first 40 train digits, made in this process."""
    source = InProcessSource(VariantEngine(unclip, [1, 4, 16, 64]), digits_train, Ledger())
    return lambda index: (
        source.take([VariantRequest(row, digits_train.source_id(row), index) for row in range(40)]).images
    )


@pytest.fixture
def client(server):
    with VariantClient(server.address) as opened:
        yield opened


def grey_levels_apart(a, b) -> int:
    return int(np.abs(a.astype(int) - b).max())


def digits(dataset, count: int = 40):
    return [dataset.stored(row) for row in range(count)]


def test_variants_equal_those_made_in_process(client, digits_train, expected):
    batch = client.variants(digits(digits_train), 5)
    assert grey_levels_apart(batch.images, expected(5)) <= 1
    assert batch.source_ids == [digits_train.source_id(row) for row in range(40)]
    assert set(batch.origins) <= {"generated", "store"}
    assert batch.images.flags.writeable
    assert batch.seconds > 0
    assert batch.retries == 0


def test_one_index_an_image_and_pairs_asked_twice(client, digits_train, expected):
    image = digits_train.stored(3)
    batch = client.variants([image, image, image], [5, 6, 5])
    assert np.array_equal(batch.images[0], batch.images[2])
    assert grey_levels_apart(batch.images[0], expected(5)[3]) <= 1
    assert grey_levels_apart(batch.images[1], expected(6)[3]) <= 1


def test_requests_larger_than_a_servers_limits_are_cut(client, digits_train):
    """The server of this test takes 64 variants in a request."""
    batch = client.variants(digits(digits_train) * 5, list(range(200)))
    assert batch.images.shape == (200, 3, 8, 8)


def test_generators_and_seeds_and_parameters(client, digits_train):
    (generator,) = client.generators()
    assert (generator.generator_id, generator.image_size, len(generator.fingerprint)) == ("stable_unclip", 8, 16)
    assert generator.default_parameters["noise_level"] == 300
    images = digits(digits_train, 2)
    assert np.array_equal(client.variants(images, 0, seeds=7).images, client.variants(images, 1, seeds=[7, 7]).images)
    plain = client.variants(images, 0).images
    assert not np.array_equal(plain, client.variants(images, 0, parameters={"noise_level": 900}).images)
    with pytest.raises(RequestRefusedError, match=r"has no generator 'unclip'.*allowed: stable_unclip"):
        client.variants(images, 0, generator="unclip")
    with pytest.raises(RequestRefusedError, match="did you mean 'noise_level'"):
        client.variants(images, 0, parameters={"noise_levl": 1})


def test_no_images_are_no_variants(client):
    assert client.variants([], []).images.shape == (0, 3, 8, 8)


def test_submitted_requests_overlap_and_can_be_dropped(client, digits_train):
    images = digits(digits_train)
    futures = [client.submit(images, index, priority="bulk") for index in range(4)]
    dropped = client.submit(images, 99)
    dropped.cancel()
    assert [future.result(30).images.shape for future in futures] == [(40, 3, 8, 8)] * 4
    assert dropped.cancelled()


def test_several_threads_use_one_client(client, digits_train, expected):
    results: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        results[index] = client.variants(digits(digits_train), index).images

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(grey_levels_apart(results[index], expected(index)) <= 1 for index in range(4))


def test_every_form_of_an_image_is_the_same_source(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 7), dtype=np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    forms = [pixels, pixels.transpose(1, 2, 0), picture, torch.from_numpy(pixels), stored_image(pixels)]
    assert len({stored_image(form).source_id for form in forms}) == 1
    grey = pixels[:1]
    assert len({stored_image(form).source_id for form in (grey, grey[0], Image.fromarray(grey[0]))}) == 1
    path = tmp_path / "image.png"
    picture.save(path)
    assert len({stored_image(form).source_id for form in (path, str(path), path.read_bytes())}) == 1


@pytest.mark.parametrize(
    ("images", "indices", "error", "words"),
    [
        ([np.zeros((3, 4, 4), np.float32)], 0, TypeError, r"image 0 has the dtype float32; uint8 in 0..255 is wanted"),
        ([GREY[0], np.zeros((2, 4, 4), np.uint8)], 0, ValueError, r"image 1 has the shape \[2, 4, 4\]; allowed"),
        ([object()], 0, TypeError, "image 0 is a object; allowed"),
        (np.zeros((3, 4, 4), np.uint8), 0, ValueError, "put it into a list"),
        (b"file", 0, ValueError, "put it into a list"),
        (["/nowhere/cat.jpg"], 0, DataError, "image 0: /nowhere/cat.jpg cannot be read: No such file"),
        (GREY[:3], [0, 1], ValueError, "3 images but 2 indices"),
        (GREY[:1], -1, ValueError, "indices: -1 is not allowed"),
        (GREY[:1], None, TypeError, "`indices` is None"),
        ([Image.new("F", (4, 4))], 0, DataError, r"image 0: .* \(mode F\), .* bring it to 8 or 16 bits"),
    ],
)
def test_what_is_no_image_or_number_is_told(images, indices, error, words):
    with pytest.raises(error, match=words):
        wanted_variants(images, indices)


def test_wrong_settings_are_told_when_the_client_is_made():
    with pytest.raises(UserError, match="targets: 'nowhere' is not the address of a server"):
        VariantClient("nowhere")
    with pytest.raises(UserError, match="at least one"):
        VariantClient([])
    with pytest.raises(ValueError, match="priority is 'soon'; allowed: interactive, training, bulk"):
        VariantClient("localhost:1", priority="soon")
    with pytest.raises(UserError, match=r"tls\.ca: /nowhere/ca\.pem cannot be read"):
        VariantClient("localhost:1", tls=ClientTLSConfig(ca="/nowhere/ca.pem")).generators()


def test_the_deadline_ends_a_call_and_says_why(tmp_path):
    address = f"unix:{tmp_path}/nobody.sock"
    with VariantClient(address, deadline_seconds=1) as client:
        started = time.monotonic()
        with pytest.raises(ServerUnavailableError, match=r"nobody.sock gives no answer \(UNAVAILABLE"):
            client.variants(GREY[:1], 0)
        assert time.monotonic() - started < 5


def test_a_pickled_client_connects_by_itself(client, digits_train):
    first = client.variants(digits(digits_train, 2), 0).images
    with pickle.loads(pickle.dumps(client)) as copy:
        assert grey_levels_apart(copy.variants(digits(digits_train, 2), 0).images, first) <= 1


def test_a_closed_client_connects_anew(server, digits_train):
    client = VariantClient(server.address)
    for _ in range(2):
        assert client.variants(digits(digits_train, 1), 0).images.shape == (1, 3, 8, 8)
        client.close()


def test_the_asynchronous_client_answers_with_what_it_cost(server, digits_train, expected):
    async def ask():
        client = AsyncVariantClient(server.address, client_id="test")
        try:
            await client.connect()
            generator = await client.find_generator(None)
            wanted = [VariantRequest(row, digits_train.source_id(row), 8) for row in range(40)]
            return await client.generate(generator, wanted, digits_train.stored, {}, deadline=30)
        finally:
            await client.close()

    answer = background.run(ask(), 60)
    assert grey_levels_apart(np.stack([pixels for pixels, _ in answer.images]), expected(8)) <= 1
    assert answer.bytes_received == 40 * 3 * 8 * 8
    assert answer.calls >= 1
    assert answer.seconds > 0
    assert (answer.retries, answer.refusals) == (0, 0)


@pytest.mark.slow
def test_a_server_restarted_in_the_middle_is_asked_on_with_its_sources_sent_anew(tmp_path, start_server, digits_train):
    images = digits(digits_train)
    with start_server(tmp_path) as first, VariantClient(first.address) as client:
        before = client.variants(images, 0)
        first.stop(signal.SIGKILL)
        waiting = client.submit(images, 0)
        time.sleep(0.3)
        assert not waiting.done()
        with start_server(tmp_path, address=first.address):
            after = waiting.result(60)
    assert after.retries > 0
    assert grey_levels_apart(before.images, after.images) <= 1


@pytest.mark.slow
def test_two_servers_share_the_work_and_one_goes_on_alone(tmp_path, start_server, digits_train):
    (tmp_path / "second").mkdir()
    images = digits(digits_train)
    with start_server(tmp_path) as first, start_server(tmp_path / "second") as second:
        for one in (first, second):
            one.wait_until_serving()
        with VariantClient([first.address, second.address], max_in_flight=2) as client:
            both = [client.submit(images, index) for index in range(12)]
            assert all(future.result(60).images.shape == (40, 3, 8, 8) for future in both)
            under_way = [client.submit(images, index) for index in range(100, 140)]
            under_way[0].result(60)
            first.stop(signal.SIGKILL)
            assert all(future.result(60).images.shape == (40, 3, 8, 8) for future in under_way)
            started = time.monotonic()
            client.variants(images, 500)
            assert time.monotonic() - started < 5, "the dead server does not hold up the other"


def test_work_goes_to_both_of_two_servers(tmp_path):
    with (
        stub_server(tmp_path) as (first, first_calls),
        stub_server(tmp_path) as (second, second_calls),
        VariantClient([first, second], max_in_flight=1) as client,
    ):
        futures = [client.submit(GREY[start : start + 10], 1) for start in range(0, 100, 10)]
        images = np.concatenate([future.result(30).images for future in futures])
    assert images[:, 0, 0, 0].tolist() == list(range(1, 101))
    assert min(len(first_calls()), len(second_calls())) >= 4


def test_servers_that_disagree_on_the_fingerprint_are_refused_with_both_names(tmp_path):
    def ask_for_seconds(client: VariantClient) -> None:
        ends = time.monotonic() + 10
        while time.monotonic() < ends:  # the second server may be met after the first call
            client.variants(GREY[:2], 0)

    with (
        stub_server(tmp_path, fingerprint=1) as (first, _),
        stub_server(tmp_path, fingerprint=2) as (second, _),
        VariantClient([first, second]) as client,
        pytest.raises(RequestRefusedError) as caught,
    ):
        ask_for_seconds(client)
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert "01010101" in str(caught.value)


def test_several_generators_want_a_name(tmp_path):
    with stub_server(tmp_path, names=["grey", "dull"]) as (address, _), VariantClient(address) as client:
        with pytest.raises(RequestRefusedError, match="several generators; name one of them: dull, grey"):
            client.variants(GREY[:1], 0)
        assert client.variants(GREY[:1], 0, generator="dull").origins == ["store"], "memory counts as store"


def test_a_source_is_uploaded_once_and_a_call_says_what_it_is(tmp_path):
    with stub_server(tmp_path) as (address, calls), VariantClient(address, deadline_seconds=20) as client:
        client.variants(GREY[:5], 0)
        client.variants(GREY[:5], 1, priority="bulk", seeds=9)
        seen = calls()
    assert [call["uploads"] for call in seen] == [0, 5, 0]
    assert [call["priority"] for call in seen] == ["PRIORITY_TRAINING", "PRIORITY_TRAINING", "PRIORITY_BULK"]
    assert seen[-1]["seeds"] == [9] * 5
    assert all(10 < call["remaining"] <= 21 for call in seen), "the server is told the deadline"


def test_a_full_server_is_left_alone_for_as_long_as_it_says(tmp_path):
    with stub_server(tmp_path, refusals=1, retry_after=0.8) as (address, calls), VariantClient(address) as client:
        batch = client.variants(GREY[:2], 0)
        first, second = (call["at"] for call in calls()[:2])
    assert batch.retries == 1
    assert 0.8 <= second - first < 2


@pytest.mark.slow
def test_a_real_servers_full_queue_shrinks_the_window_and_serves_everything(tmp_path, start_server, digits_train):
    limits = ("limits.max_queued_variants=16", "limits.max_variants_per_request=8")
    with start_server(tmp_path, *limits) as server:
        server.wait_until_serving()

        async def ask():
            client = AsyncVariantClient(server.address, max_in_flight=16)
            try:
                await client.connect()
                generator = await client.find_generator()
                wanted = [VariantRequest(row, digits_train.source_id(row), 0) for row in range(400)]
                answer = await client.generate(
                    generator, wanted, digits_train.stored, {"num_inference_steps": 10}, deadline=60
                )
                return answer, client.smallest_windows
            finally:
                await client.close()

        answer, windows = background.run(ask(), 90)
    assert len(answer.images) == 400
    assert answer.refusals > 0
    assert answer.retries >= answer.refusals
    assert windows[server.address] < 16


def test_the_window_halves_once_for_one_full_queue_and_grows_by_one_a_round():
    window = Window(8)
    for _ in range(4):
        window.refused(sent=1.0, now=2.0)
    assert window.size == 4, "requests sent together are refused together"
    window.refused(sent=3.0, now=4.0)
    for _ in range(2):
        window.succeeded()
    assert window.size == 3
    for _ in range(3 + 4 + 5 + 6 + 7 + 20):
        window.succeeded()
    assert window.size == 8
    for step in range(5):
        window.refused(sent=10.0 + step, now=10.5 + step)
    assert window.size == 1


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "other_ca.pem"))
    for name in ("localhost", "client"):
        issued = authority.issue_cert(name)
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    return folder


def test_a_secure_channel_with_a_token_and_a_certificate_of_ones_own(tmp_path, certificates):
    server = {"certificate": f"{certificates}/localhost.pem", "key": f"{certificates}/localhost.key"}
    own = {"certificate": certificates / "client.pem", "key": certificates / "client.key"}
    ca = certificates / "ca.pem"
    with stub_server(tmp_path, token="secret", client_ca=str(ca), **server) as (address, _):
        with VariantClient(address, token="secret", tls=ClientTLSConfig(ca=ca, **own)) as client:
            assert client.variants(GREY[:3], 1).images[2, 0, 0, 0] == 3
        with (
            VariantClient(address, token="secret", tls=ClientTLSConfig(ca=ca), deadline_seconds=1) as client,
            pytest.raises(ServerUnavailableError, match=r"gives no answer|wants a certificate of the client"),
        ):
            client.variants(GREY[:1], 0)


def test_a_server_with_a_foreign_certificate_is_not_talked_to(tmp_path, certificates):
    server = {"certificate": f"{certificates}/localhost.pem", "key": f"{certificates}/localhost.key"}
    with (
        stub_server(tmp_path, **server) as (address, calls),
        VariantClient(address, tls=ClientTLSConfig(ca=certificates / "other_ca.pem"), deadline_seconds=1) as client,
    ):
        with pytest.raises(
            ServerUnavailableError, match=r"must be signed by tls\.ca|signed by none of the authorities"
        ):
            client.variants(GREY[:1], 0)
        assert calls() == []


def test_a_wrong_token_is_refused_at_once_with_what_to_do(tmp_path):
    with stub_server(tmp_path, token="secret") as (address, _):
        with VariantClient(address, token="secret") as client:
            assert client.variants(GREY[:1], 0).images.shape == (1, 3, 4, 4)
        with (
            VariantClient(address, token="guess") as client,
            pytest.raises(RequestRefusedError, match=r"UNAUTHENTICATED: .*give the token"),
        ):
            client.variants(GREY[:1], 0)


def test_an_unencrypted_channel_to_elsewhere_is_warned_of_once(caplog):
    for _ in range(2):
        client = VariantClient("192.0.2.1:50051", token="secret", deadline_seconds=0.1)
        with client, pytest.raises(ServerUnavailableError):
            client.variants(GREY[:1], 0)
    assert [record.message for record in caplog.records if "unencrypted" in record.message] == [
        "images and the token go to 192.0.2.1:50051 unencrypted; give the client tls=, and the server file a tls block"
    ]


def test_users_of_the_loop_end_their_own_work_only():
    mine, other = background.Tasks(), background.Tasks()
    order = []

    async def note(word: str) -> None:
        order.append(word)

    async def wait() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            order.append("cancelled")

    forever, going_on = mine.start(wait()), other.start(asyncio.sleep(0.3, "done"))
    time.sleep(0.1)
    mine.close(note("torn down"))
    assert order == ["cancelled", "torn down"]
    assert forever.cancelled()
    assert going_on.result(5) == "done"
    with pytest.raises(RuntimeError, match="closed"):
        mine.start(note("late"))
    with pytest.raises(TimeoutError):
        background.run(asyncio.sleep(30), 0.05)


def test_the_clients_import_no_torch():
    code = (
        "import sys, genssl; genssl.VariantClient, genssl.AsyncVariantClient;"
        "print([name for name in ('torch', 'torchvision', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_the_package_names_what_it_exports():
    assert set(genssl.__all__) <= set(dir(genssl))
    with pytest.raises(AttributeError, match="no attribute 'VariantClients'"):
        genssl.VariantClients  # noqa: B018
