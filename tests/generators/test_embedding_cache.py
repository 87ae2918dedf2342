"""Embeddings of sources on disk: equal to fresh ones, of one conditioner alone, whole after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from genssl.errors import GeneratorError
from genssl.generators.configs import FlowConfig, StableUnCLIPConfig
from genssl.generators.diffusion import unclip_encoder
from genssl.generators.embedding_cache import DiskEmbeddings, open_embeddings, rounded
from genssl.generators.open import open_generator
from genssl.variants import engine as engine_module
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest

CPU = torch.device("cpu")
NAME = bytes(range(16))


def unclip_with(folder, **settings) -> VariantEngine:
    config = StableUnCLIPConfig(
        model="builtin:digits-unclip", embedding_cache=str(folder), num_inference_steps=2, **settings
    )
    return VariantEngine(open_generator(config, CPU), [8])


def requests(dataset, rows) -> list[VariantRequest]:
    return [VariantRequest(row, dataset.source_id(row), 3) for row in rows]


def test_kept_embeddings_make_the_variants_of_fresh_ones_without_the_encoder(tmp_path, digits_test, monkeypatch):
    fresh = unclip_with(tmp_path / "kept")
    made = InProcessSource(fresh, digits_test, Ledger()).take(requests(digits_test, range(8))).images
    assert len(fresh.kept) == 8

    def no_encoder(*_):
        raise AssertionError("the image encoder was loaded")

    monkeypatch.setattr(unclip_encoder, "image_encoder", no_encoder)
    kept = unclip_with(tmp_path / "kept")
    assert kept.generator.spec == fresh.generator.spec
    again = InProcessSource(kept, digits_test, Ledger()).take(requests(digits_test, range(8))).images
    np.testing.assert_array_equal(again, made)
    with pytest.raises(AssertionError, match="was loaded"):
        InProcessSource(kept, digits_test, Ledger()).take(requests(digits_test, [8]))


def test_variants_of_rounded_embeddings_have_names_of_their_own(tmp_path, unclip):
    rounded_too = unclip_with(tmp_path / "kept").generator.spec
    plain = open_generator(StableUnCLIPConfig(model="builtin:digits-unclip", num_inference_steps=2), CPU).spec
    assert rounded_too.fingerprint != plain.fingerprint
    assert rounded_too.fingerprint == unclip_with(tmp_path / "elsewhere").generator.spec.fingerprint
    assert rounded_too.settings["embeddings"] == "float16"


def test_equal_conditioners_share_a_folder_and_others_are_refused(tmp_path):
    first = unclip_with(tmp_path / "kept")
    assert unclip_with(tmp_path / "kept", guidance_scale=3.0, zero_terminal_snr=True).kept is first.kept
    flow = FlowConfig(model="builtin:digits-flow", embedding_cache=str(tmp_path / "kept"))
    with pytest.raises(GeneratorError, match=r"kept holds embeddings of another conditioner \(.{12}\) than this"):
        open_generator(flow, CPU)
    del first
    with pytest.raises(GeneratorError, match="holds embeddings of another conditioner"):
        open_generator(flow, CPU)
    with pytest.raises(GeneratorError, match="holds embeddings of another conditioner"):
        unclip_with(tmp_path / "kept", dtype="bfloat16")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.jpeg").write_bytes(b"mine")
    with pytest.raises(GeneratorError, match=r"holds something else \(photo.jpeg\); give a new folder"):
        open_embeddings(str(tmp_path), NAME, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpeg"]
    (tmp_path / "photo.jpeg").rename(tmp_path / "embeddings.json")
    with pytest.raises(GeneratorError, match="cannot be used"):
        open_embeddings(str(tmp_path), NAME, 4)


def test_what_was_put_before_a_kill_is_there_and_more_can_follow(tmp_path):
    script = f"""
        import torch
        from pathlib import Path
        from genssl.generators.embedding_cache import DiskEmbeddings

        kept = DiskEmbeddings(Path({str(tmp_path / "kept")!r}), {NAME!r}, 4)
        number = 0
        while True:
            kept.put([(number + i).to_bytes(16, "big") for i in range(8)], [torch.full((4,), float(number))] * 8)
            number += 8
            print(number, flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) >= 64:
            os.kill(child.pid, signal.SIGKILL)
            break
    child.wait()
    kept = DiskEmbeddings(tmp_path / "kept", NAME, 4)
    assert len(kept) >= 64
    assert len(kept) % 8 == 0, "a batch is there whole or not at all"
    for number in range(len(kept)):
        assert kept.get(number.to_bytes(16, "big")).tolist() == [number // 8 * 8] * 4
    kept.put([NAME], [torch.ones(4)])
    assert kept.get(NAME).tolist() == [1] * 4
    assert kept.get(bytes(16)[:-1] + b"\xff") is None or len(kept) > 255


def in_fork(work) -> str:
    """Runs `work` in a forked child and returns what it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = str(work())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


def test_a_forked_child_is_refused_and_the_parent_is_unharmed(tmp_path):
    folder = tmp_path / "kept"
    kept = open_embeddings(str(folder), NAME, 4)
    kept.put([NAME], [torch.ones(4)])
    (tmp_path / "alias").symlink_to(folder)
    for use in (
        lambda: kept.get(NAME),
        lambda: kept.put([bytes(16)], [torch.ones(4)]),
        lambda: len(kept),
        lambda: open_embeddings(str(folder), NAME, 4),
        lambda: DiskEmbeddings(tmp_path / "alias", NAME, 4),
    ):
        answer = in_fork(use)
        assert answer.startswith(
            f"GeneratorError: generator.embedding_cache: {folder} was opened in process {os.getpid()}"
        )
        assert "is used in its forked child" in answer
        assert "start workers by forkserver or spawn and open it there" in answer
    kept.put([bytes(16)], [torch.zeros(4)])
    assert (len(kept), kept.get(NAME).tolist()) == (2, [1] * 4)
    assert open_embeddings(str(tmp_path / "alias"), NAME, 4) is kept
    kept = None
    # Opened after the fork only, which is what the message advises.
    assert in_fork(lambda: open_embeddings(str(folder), NAME, 4).get(NAME).tolist()) == "[1.0, 1.0, 1.0, 1.0]"


def test_an_embedding_beyond_float16_is_refused():
    kept = rounded([torch.tensor([0.1, -3.0])])
    assert kept[0].tolist() == torch.tensor([0.1, -3.0]).half().float().tolist()
    with pytest.raises(GeneratorError, match="beyond float16"):
        rounded([torch.tensor([1e6])])


def test_the_encoder_is_dropped_when_nothing_needs_it_and_comes_back(tmp_path, digits_test, monkeypatch):
    engine = unclip_with(tmp_path / "kept")
    source = InProcessSource(engine, digits_test, Ledger())
    source.take(requests(digits_test, [0]))
    assert engine.generator._encoder._network is not None  # type: ignore[attr-defined]
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", -1.0)
    first = source.take(requests(digits_test, [0])).images
    assert engine.generator._encoder._network is None  # type: ignore[attr-defined]
    np.testing.assert_array_equal(source.take(requests(digits_test, [0, 1])).images[:1], first)
