"""The wire contract, spoken to a real server process with the bare stubs."""

from __future__ import annotations

import io
import itertools
import shutil
import signal
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from safetensors.torch import load_file, save_file

from genssl.data.base import StoredImage, raw_image
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.generators.models import BUILTIN
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def source_of(stored: StoredImage, *, with_data: bool = True) -> pb.SourceImage:
    encoding = pb.IMAGE_ENCODING_RAW if stored.encoding == "raw" else pb.IMAGE_ENCODING_FILE
    return pb.SourceImage(
        digest=stored.source_id,
        data=stored.data if with_data else b"",
        encoding=encoding,
        channels=stored.channels,
        height=stored.height,
        width=stored.width,
    )


def ask(sources, specs, **fields) -> pb.GenerateVariantsRequest:
    return pb.GenerateVariantsRequest(generator_id="stable_unclip", sources=sources, variants=specs, **fields)


def spec(source: int = 0, index: int = 0, **fields) -> pb.VariantSpec:
    return pb.VariantSpec(source_index=source, variant_index=index, **fields)


def pixels(variant: pb.Variant) -> np.ndarray:
    assert variant.status.code == pb.ITEM_CODE_OK, variant.status.message
    return np.frombuffer(variant.data, np.uint8).reshape(variant.channels, variant.height, variant.width)


def refusal(stub, request) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        stub.GenerateVariants(request, timeout=30)
    assert "Traceback" not in caught.value.details()
    return caught.value


def test_variants_equal_those_made_in_process(stub, unclip, digits_test):
    rows = list(range(20))
    request = ask([source_of(digits_test.stored(row)) for row in rows], [spec(row, 3 + row) for row in rows])
    response = stub.GenerateVariants(request, timeout=60)
    local = InProcessSource(VariantEngine(unclip, [1, 4, 16, 64]), digits_test, Ledger())
    expected = local.take([VariantRequest(row, digits_test.source_id(row), 3 + row) for row in rows]).images
    got = np.stack([pixels(variant) for variant in response.variants])
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert [variant.spec_index for variant in response.variants] == rows
    assert {variant.origin for variant in response.variants} == {pb.ORIGIN_GENERATED}
    assert response.timings.generate_seconds > 0


def test_a_source_is_sent_once_and_then_known_by_its_digest(stub, digits_test):
    stored = digits_test.stored(100)
    unknown = stub.GenerateVariants(ask([source_of(stored, with_data=False)], [spec()]), timeout=30)
    assert list(unknown.missing_digests) == [stored.source_id]
    assert unknown.variants[0].status.code == pb.ITEM_CODE_SOURCE_MISSING
    sent = stub.GenerateVariants(ask([source_of(stored)], [spec()]), timeout=30)
    known = stub.GenerateVariants(ask([source_of(stored, with_data=False)], [spec()]), timeout=30)
    assert not known.missing_digests
    assert np.array_equal(pixels(known.variants[0]), pixels(sent.variants[0]))


def test_png_output_has_the_same_pixels(stub, digits_test):
    sources = [source_of(digits_test.stored(0))]
    raw = stub.GenerateVariants(ask(sources, [spec()]), timeout=30).variants[0]
    png = stub.GenerateVariants(
        ask(sources, [spec()], output=pb.OutputSpec(encoding=pb.IMAGE_ENCODING_PNG)), timeout=30
    ).variants[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png.data))).transpose(2, 0, 1), pixels(raw))


def test_parameters_of_a_row_stand_above_the_requests(stub, digits_test):
    sources = [source_of(digits_test.stored(0))]
    specs = [spec(parameters={"noise_level": 0}), spec(), spec(seed=5), spec(index=9, seed=5)]
    own, shared, seeded, seeded_too = (
        pixels(variant)
        for variant in stub.GenerateVariants(ask(sources, specs, parameters={"noise_level": 600}), timeout=30).variants
    )
    default = pixels(stub.GenerateVariants(ask(sources, [spec(parameters={"noise_level": 0})]), timeout=30).variants[0])
    assert np.abs(own.astype(int) - default).max() <= 1
    assert not np.array_equal(own, shared)
    assert np.array_equal(seeded, seeded_too)


def test_bad_items_fail_alone(stub, digits_test):
    good = digits_test.stored(0)
    truncated = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(truncated, "JPEG")
    half = StoredImage(truncated.getvalue()[: len(truncated.getvalue()) // 2], "file")
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    foreign = StoredImage(gif.getvalue(), "file")
    huge = raw_image(np.zeros((1, 200, 200), np.uint8))
    wrong_digest = source_of(good)
    wrong_digest.digest = bytes(16)
    wrong_shape = source_of(good)
    wrong_shape.height, wrong_shape.digest = 9, StoredImage(good.data, "raw", 1, 9, 8).source_id
    sources = [source_of(good), source_of(half), source_of(foreign), source_of(huge), wrong_digest, wrong_shape]
    specs = [spec(i) for i in range(6)] + [
        spec(7),
        spec(0, parameters={"noise_levl": 1}),
        spec(0, parameters={"noise_level": float("nan")}),
    ]
    response = stub.GenerateVariants(ask(sources, specs), timeout=30)
    codes = [pb.ItemCode.Name(variant.status.code).removeprefix("ITEM_CODE_") for variant in response.variants]
    assert codes == ["OK", *["BAD_IMAGE"] * 3, "DIGEST_MISMATCH", "BAD_IMAGE", *["BAD_SPEC"] * 3]
    messages = [variant.status.message for variant in response.variants]
    for position, words in {
        1: "corrupt",
        2: "known format",
        3: "limit is 10,000",
        5: "cannot have 64 bytes",
        7: "did you mean",
    }.items():
        assert words in messages[position]


def test_requests_that_break_a_limit_are_refused_whole(stub, digits_test):
    source = source_of(digits_test.stored(0))
    too_many = refusal(stub, ask([source], [spec(index=i) for i in range(65)]))
    assert (too_many.code(), "1 to 64" in too_many.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert refusal(stub, ask([source], [])).code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal(stub, ask([source] * 3, [spec()])).code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (
        refusal(stub, ask([source], [spec()], output=pb.OutputSpec(encoding=2))).code()
        == grpc.StatusCode.INVALID_ARGUMENT
    )
    oversized = pb.SourceImage(digest=bytes(16), data=bytes(33 * 2**20), encoding=pb.IMAGE_ENCODING_FILE)
    assert refusal(stub, ask([oversized], [spec()])).code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_unknown_generator_names_those_there_are(stub):
    error = refusal(stub, pb.GenerateVariantsRequest(generator_id="stable_unclipp", variants=[spec()]))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "did you mean 'stable_unclip'" in error.details()


def test_another_fingerprint_is_refused(stub, digits_test):
    request = ask([source_of(digits_test.stored(0))], [spec()], expected_fingerprint=bytes(16))
    assert refusal(stub, request).code() == grpc.StatusCode.FAILED_PRECONDITION


def test_server_info_and_generators_say_what_requests_need(stub, unclip):
    info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=5)
    assert (info.max_variants_per_request, info.max_image_pixels) == (64, 10000)
    (generator,) = stub.ListGenerators(pb.ListGeneratorsRequest(), timeout=5).generators
    assert generator.fingerprint == unclip.spec.fingerprint
    assert (generator.image_size, generator.embedding_dim, generator.licence) == (8, 64, "Apache-2.0")
    assert dict(generator.settings)["dtype"] == "float32"
    assert generator.default_parameters["noise_level"] == 300


def test_clients_see_the_name_of_a_folder_and_not_where_it_lies(start_server, tmp_path):
    folder = tmp_path / "secret" / "my-unclip"
    shutil.copytree(BUILTIN / "digits-unclip", folder)
    with start_server(tmp_path, f"generators.0.model={folder}") as server:
        server.wait_until_serving()
        with grpc.insecure_channel(server.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            answer = stub.ListGenerators(pb.ListGeneratorsRequest(), timeout=5)
    assert answer.generators[0].model == "my-unclip"
    assert "secret" not in str(answer)


def test_variants_that_are_no_numbers_are_errors_and_the_server_goes_on(start_server, tmp_path, digits_test):
    folder = tmp_path / "fragile"
    shutil.copytree(BUILTIN / "digits-unclip", folder)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.weight"] *= 1e19  # finite, and so are its images, unless guidance makes them larger still
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    with start_server(tmp_path, f"generators.0.model={folder}") as server:
        server.wait_until_serving()
        with grpc.insecure_channel(server.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            for index in range(2):
                request = ask([source_of(digits_test.stored(0))], [spec(0, index), spec(0, 9)])
                made = stub.GenerateVariants(request, timeout=60).variants
                assert [pixels(variant).shape for variant in made] == [(3, 8, 8)] * 2
                request.parameters["guidance_scale"] = 100
                for variant in stub.GenerateVariants(request, timeout=60).variants:
                    assert variant.status.code == pb.ITEM_CODE_GENERATOR_FAILED
                    said = "generator stable_unclip (fragile): 1 of 1 images hold NaN or infinite numbers. The weights "
                    assert variant.status.message.startswith(said)
                    assert str(tmp_path) not in variant.status.message
        assert server.process.poll() is None


def test_reflection_lists_the_service(server):
    with grpc.insecure_channel(server.address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"genssl.generation.v1.GenerationService", "grpc.health.v1.Health"} <= set(services)


@pytest.mark.slow
def test_sigterm_finishes_the_request_under_way_and_ends_with_code_zero(start_server, tmp_path, digits_test):
    with start_server(tmp_path) as server:
        server.wait_until_serving()
        with grpc.insecure_channel(server.address) as channel:
            sources = [source_of(digits_test.stored(row)) for row in range(64)]
            slow = ask(sources, [spec(i % 64, i) for i in range(512)], parameters={"num_inference_steps": 20})
            stub = pb_grpc.GenerationServiceStub(channel)
            future = stub.GenerateVariants.future(slow, timeout=60)
            while stub.GetStatistics(pb.GetStatisticsRequest(), timeout=30).generators[0].running == 0:
                time.sleep(0.01)
            assert not future.done()
            server.process.send_signal(signal.SIGTERM)
            assert len(future.result().variants) == 512
        assert server.process.wait(timeout=30) == 0


def test_streams_that_only_wait_do_not_hold_a_shutdown(start_server, tmp_path):
    with start_server(tmp_path, "drain_seconds=250") as server, grpc.insecure_channel(server.address) as channel:
        server.wait_until_serving()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        talking = threading.Event()
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        questions = itertools.chain([question], (question for _ in iter(talking.wait, False)))
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(questions)
        assert next(reflected).list_services_response.service
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        try:
            assert server.process.wait(timeout=25) == 0
        finally:
            reflected.cancel()
            talking.set()


@pytest.mark.slow
def test_a_server_whose_store_is_deleted_serves_on_and_says_so_once(start_server, tmp_path, digits_test):
    store = tmp_path / "store"
    with start_server(tmp_path, f"store={{path: {store}}}") as server:
        server.wait_until_serving()
        with grpc.insecure_channel(server.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            for index in range(4):
                request = ask([source_of(digits_test.stored(0))], [spec(index=index)])
                assert pixels(stub.GenerateVariants(request, timeout=30).variants[0]).any()
                if index == 0:
                    assert store.is_dir()
                    shutil.rmtree(store)
        assert server.stop() == 0
    log = server.log_path.read_text()
    assert log.count(f"{store} was deleted, moved or replaced while this process had it open") == 1
    assert "Traceback" not in log
    assert not store.exists()


def test_a_server_is_not_serving_while_it_loads(start_server, tmp_path):
    with start_server(tmp_path) as server:
        assert server.health() == health_pb2.HealthCheckResponse.NOT_SERVING
        with grpc.insecure_channel(server.address) as channel:
            early = refusal(pb_grpc.GenerationServiceStub(channel), ask([], [spec()]))
        assert early.code() == grpc.StatusCode.UNAVAILABLE, "clients of a restarted server ask again"
        server.wait_until_serving()


def test_a_model_that_is_not_there_ends_the_server_with_one_message(start_server, tmp_path):
    with start_server(tmp_path, "generators.0.model=builtin:nothing") as server:
        assert server.process.wait(timeout=60) == 2
    log = server.log_path.read_text()
    assert "genssl: generator.model: there is no built-in model 'nothing'" in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_an_address_in_use_is_one_message(server, start_server, tmp_path):
    with pytest.raises(AssertionError, match="cannot be bound"), start_server(tmp_path, address=server.address):
        pass


@pytest.mark.slow
def test_a_socket_file_is_not_taken_from_the_server_that_listens_on_it(start_server, tmp_path):
    (tmp_path / "second").mkdir()
    address = f"unix:{tmp_path}/shared.sock"
    with start_server(tmp_path, address=address) as first:
        first.wait_until_serving()
        with pytest.raises(AssertionError, match="cannot be bound"), start_server(tmp_path / "second", address=address):
            pass
        first.wait_until_serving()
