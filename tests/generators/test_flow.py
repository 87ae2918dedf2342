"""The flow's sampler: the contract of a generator, and Euler steps against a straight-line computation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_flow import FACTS, build_tiny_flow

from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Cancelled
from genssl.generators.configs import FlowConfig
from genssl.generators.flow import Flow, noise_embeddings, velocity

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_tiny_flow(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def embeddings(tiny) -> torch.Tensor:
    images = np.random.default_rng(2).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
    return make(tiny).embed(torch.from_numpy(images))


def make(folder: Path | str, **settings) -> Flow:
    return Flow(FlowConfig(model=str(folder), **settings), CPU)


def grey_levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def mixed(generator: Flow, count: int) -> list[dict[str, float | int]]:
    """Parameters that differ in all that may differ within a batch."""
    return [
        {**generator.spec.defaults, "guidance_scale": 1.5 + row, "embedding_noise": 0.25 * row} for row in range(count)
    ]


def test_an_image_is_the_sum_of_its_euler_steps(tiny, embeddings):
    """Written out for one row, with guidance and noise, from the formulas of the module's docstring."""
    generator = make(tiny, num_inference_steps=3, guidance_scale=2.0, embedding_noise=0.5)
    made = generator.generate(embeddings[:1], [11], [generator.spec.defaults])
    stream = torch.Generator().manual_seed(11)
    mixed_in, x = torch.randn(1, 32, generator=stream), torch.randn(1, 3, 16, 16, generator=stream)
    condition = torch.cat([(embeddings[:1] + 0.5 * mixed_in) / 1.25**0.5, torch.tensor([[0.5]])], dim=1)
    network = generator._network
    with torch.inference_mode():
        for t in (0.0, 1 / 3, 2 / 3):
            times = torch.tensor([t])
            free, wanted = (velocity(network, x, times, c) for c in (torch.zeros(1, 33), condition))
            x = x + (free + 2.0 * (wanted - free)) / 3
    expected = ((x / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert expected.std() > 10, "the random network must make a picture to compare"
    assert grey_levels_apart(made.numpy(), expected) <= 1


def test_noise_keeps_the_length_of_embeddings_and_is_told():
    embeddings = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))
    levels = torch.full((4000,), 0.7)
    noised = noise_embeddings(embeddings, noise, levels)
    assert float(noised[:, :-1].std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(noised[:, -1], levels)
    assert torch.equal(noise_embeddings(embeddings, noise, torch.zeros(4000))[:, :-1], embeddings)


def test_rows_with_their_own_parameters_do_not_see_each_other(tiny, embeddings):
    generator = make(tiny, guidance_scale=3.0)
    parameters, seeds = mixed(generator, 5), [11, 12, 13, 14, 2**63 + 5]
    together = generator.generate(embeddings[:5], seeds, parameters).numpy()
    alone = [generator.generate(embeddings[i : i + 1], seeds[i : i + 1], [parameters[i]]).numpy() for i in range(5)]
    assert grey_levels_apart(together, np.concatenate(alone)) <= 1
    assert len({image.tobytes() for image in together}) == 5


def test_a_row_is_bit_equal_at_an_equal_batch_size(tiny, embeddings):
    generator = make(tiny)
    parameters = [generator.spec.defaults] * 8
    first = generator.generate(embeddings, list(range(8)), parameters)
    others = generator.generate(embeddings[[0, *range(7)]], [0, *range(100, 107)], parameters)
    assert torch.equal(first[0], others[0])


def test_seed_embedding_and_parameters_each_change_the_image(tiny, embeddings):
    generator = make(tiny, embedding_noise=0.5)
    defaults = generator.spec.defaults
    alone = generator.generate(embeddings[:1], [5], [defaults])
    assert torch.equal(alone, generator.generate(embeddings[:1], [5], [defaults]))
    for other in (
        generator.generate(embeddings[:1], [6], [defaults]),
        generator.generate(embeddings[1:2], [5], [defaults]),
        generator.generate(embeddings[:1], [5], [{**defaults, "embedding_noise": 1.5}]),
        generator.generate(embeddings[:1], [5], [{**defaults, "guidance_scale": 4.0}]),
        generator.generate(embeddings[:1], [5], [{**defaults, "num_inference_steps": 2}]),
    ):
        assert not torch.equal(other, alone)


def test_only_rows_of_equal_steps_and_guidance_share_a_batch(tiny):
    generator = make(tiny)
    keys = {
        generator.batch_key({**generator.spec.defaults, "num_inference_steps": steps, "guidance_scale": scale})
        for steps in (1, 2)
        for scale in (0.5, 1.0, 2.0, 3.0)
    }
    assert len(keys) == 4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_shrinks_step_by_step_to_the_rows_still_wanted(tiny, embeddings, guidance):
    generator = make(tiny, num_inference_steps=4)
    parameters = [{**row, "guidance_scale": guidance} for row in mixed(generator, 8)]
    whole = generator.generate(embeddings, list(range(8)), parameters).numpy()
    wanted = iter([range(8), {1, 2, 5}, {2, 5}, {5}, {5}])  # before every step, and before decoding
    computed = []
    hook = generator._network.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))

    def alive() -> list[bool]:
        rows = next(wanted)
        return [row in rows for row in range(8)]

    made = generator.generate(embeddings, list(range(8)), parameters, alive=alive, sizes=[1, 4]).numpy()
    hook.remove()
    assert computed == [size * (2 if guidance > 1 else 1) for size in (8, 4, 4, 1)]
    assert grey_levels_apart(made[5], whole[5]) <= 1
    assert not made[[0, 3, 4, 6, 7]].any()


def test_a_batch_that_nobody_wants_is_cancelled(tiny, embeddings):
    generator = make(tiny)
    asked = []

    def until_the_third_step() -> list[bool]:
        asked.append(None)
        return [len(asked) < 3] * 8

    with pytest.raises(Cancelled):
        generator.generate(embeddings, list(range(8)), [generator.spec.defaults] * 8, alive=until_the_third_step)
    assert len(asked) == 3


def test_loading_and_generating_leave_the_global_random_stream_alone(tiny, embeddings):
    before = torch.random.get_rng_state()
    generator = make(tiny)
    generator.generate(embeddings[:1], [1], [generator.spec.defaults])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_embeddings_of_any_image_have_the_length_of_the_root_of_their_width(tiny):
    generator = make(tiny)
    prepared = generator.preprocess(np.random.default_rng(0).integers(0, 256, (3, 33, 71), dtype=np.uint8))
    assert prepared.shape == (3, 16, 16)
    embedding = generator.embed(torch.from_numpy(prepared[None]))
    assert embedding.shape == (1, generator.spec.embedding_dim)
    assert embedding.dtype == torch.float32
    assert float(embedding.norm()) == pytest.approx(32**0.5, rel=1e-5)


def test_bfloat16_makes_nearly_the_same_image(tiny, embeddings):
    made = [
        generator.generate(embeddings, list(range(8)), [generator.spec.defaults] * 8).float()
        for generator in (make(tiny), make(tiny, dtype="bfloat16"))
    ]
    assert float((made[0] - made[1]).abs().mean()) < 3


def test_fingerprint_names_weights_encoder_config_and_dtype_but_not_the_card(tiny, tmp_path):
    original = make(tiny).spec.fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    (copy / "README.md").write_text("words")
    (copy / "card.json").write_text('{"licence": "MIT"}')
    assert make(copy).spec.fingerprint == original
    assert make(copy).spec.licence == "MIT"
    assert make(tiny, dtype="bfloat16").spec.fingerprint != original
    assert make(tiny, num_inference_steps=8).spec.fingerprint == original
    other = build_tiny_flow(tmp_path / "other", seed=1)
    for file in ("unet.safetensors", "encoder.safetensors"):
        shutil.copytree(tiny, copy, dirs_exist_ok=True)
        shutil.copy(other / file, copy / file)
        assert make(copy).spec.fingerprint != original, file
    shutil.copytree(tiny, copy, dirs_exist_ok=True)
    (copy / "config.json").write_text(json.dumps(FACTS | {"max_embedding_noise": 3.0}))
    assert make(copy).spec.fingerprint != original


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_inference_steps", 0, r"num_inference_steps: 0 is outside 1\.\.1000"),
        ("guidance_scale", float("nan"), "guidance_scale: nan is outside"),
        ("embedding_noise", 2.5, r"embedding_noise: 2.5 is outside 0\.\.2, the noise that it was trained with"),
    ],
)
def test_impossible_parameters_are_refused(tiny, name, value, message):
    generator = make(tiny)
    with pytest.raises(RequestRefusedError, match=message):
        generator.check({**generator.spec.defaults, name: value})


def test_a_default_that_the_model_cannot_do_is_refused_at_once(tiny):
    with pytest.raises(GeneratorError, match="embedding_noise: 5"):
        make(tiny, embedding_noise=5.0)


def test_a_model_that_is_not_there_says_how_to_make_one():
    with pytest.raises(GeneratorError, match=r"no built-in model 'digits-flwo'; did you mean 'digits-flow'"):
        make("builtin:digits-flwo")
    with pytest.raises(GeneratorError, match=r"no built-in model 'digits-unclip'; .*allowed: digits-flow"):
        make("builtin:digits-unclip")
    with pytest.raises(GeneratorError, match="genssl train-generator RECIPE --out DIR"):
        make("./nowhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": "Other"}'), "the model is a Other"),
        (lambda folder: (folder / "unet.safetensors").unlink(), r"unet.safetensors: .*incomplete"),
        (
            lambda folder: (folder / "unet.safetensors").write_bytes(b"\x80\x04pickle"),
            r"unet.safetensors: .*incomplete",
        ),
        (lambda folder: (folder / "encoder.safetensors").unlink(), "encoder.safetensors: cannot be read"),
        (
            lambda folder: shutil.copy(folder / "unet.safetensors", folder / "encoder.safetensors"),
            "is not an encoder of genssl",
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps(FACTS | {"block_out_channels": [8, 24]})),
            "does not fit",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps({key: value for key, value in FACTS.items() if key != "image_size"})
            ),
            "image_size",
        ),
    ],
    ids=[
        "no config",
        "other class",
        "no weights",
        "a pickle",
        "no encoder",
        "no genssl encoder",
        "other sizes",
        "no size",
    ],
)
def test_a_damaged_folder_is_refused_by_name(tiny, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    damage(copy)
    with pytest.raises(GeneratorError, match=message):
        make(copy)


def test_an_encoder_of_another_width_is_refused(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    facts = FACTS | {"embedding_dim": 16}
    from safetensors.torch import save_file

    from genssl.generators.flow import build_network

    save_file(build_network(facts).state_dict(), copy / "unet.safetensors")
    (copy / "config.json").write_text(json.dumps(facts))
    with pytest.raises(GeneratorError, match="embeddings of 16 numbers, the encoder makes 32"):
        make(copy)
