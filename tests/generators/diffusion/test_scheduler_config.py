"""Every field of a scheduler config is followed as diffusers follows it, or refused, or changes nothing."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableUnCLIPImg2ImgPipeline,
    TCDScheduler,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from tiny import build_tiny_unclip

from genssl.errors import GeneratorError
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.few_step import LCM, TCD
from genssl.generators.diffusion.flux2_klein import FlowEuler
from genssl.generators.diffusion.sampling import read_ddim
from genssl.generators.diffusion.scheduler_config import (
    DDIM_FIELDS,
    DIFFUSION,
    FLOW_FIELDS,
    LCM_FIELDS,
    NOISING_FIELDS,
    SPACED_DDIM_FIELDS,
    TCD_FIELDS,
    Fields,
    read_scheduler,
)
from genssl.generators.diffusion.stable_unclip import StableUnCLIP
from genssl.generators.fingerprint import fingerprint_folder

CPU = torch.device("cpu")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
FIRST = torch.randn((2, 4, 6, 6), generator=torch.Generator().manual_seed(0))
COUNT = 7


def folder_of(path: Path, config: dict[str, Any], part: str = "scheduler") -> Path:
    (path / part).mkdir(exist_ok=True)
    (path / part / "scheduler_config.json").write_text(json.dumps(config))
    return path


def network(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Stands for a model: what it makes of latents depends on them and on the time, and goes beyond 1."""
    return 1.5 * torch.sin(3 * x + float(timestep) / 300)


def largest_difference(
    sampler: Any, scheduler: Any, *, divide: float = 1.0, noise: list[torch.Tensor] | None = None, **settings
) -> float:
    """Returns how far, in parts of the latents' size, a step of ours goes beside diffusers' own, the worst of all."""
    found, x = [], FIRST.clone()
    steps = sampler.steps(COUNT, 6)
    assert [float(step.timestep) * divide for step in steps] == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    for number, (step, timestep) in enumerate(zip(steps, scheduler.timesteps, strict=True)):
        output = network(x, step.timestep)
        drawn = noise[number] if noise is not None and number < len(noise) else None
        made = sampler.move(step, x, output, drawn)
        x = scheduler.step(output, timestep, x, return_dict=False, **settings)[0]
        found.append(((made - x).abs().max() / x.abs().max()).item())
    return max(found)


def result(sampler: Any) -> torch.Tensor:
    x = FIRST.clone()
    for step in sampler.steps(COUNT, 6):
        x = sampler.move(step, x, network(x, step.timestep), None)
    return x


def parameters(kind: str) -> list[str]:
    found = list(inspect.signature(getattr(diffusers, kind).__init__).parameters)[1:]
    if found == ["args", "kwargs"]:
        pytest.skip(f"{kind} needs a package that is not here")
    return found


@pytest.mark.parametrize("kind", DIFFUSION)
@pytest.mark.parametrize(
    "fields", [DDIM_FIELDS, SPACED_DDIM_FIELDS, LCM_FIELDS, TCD_FIELDS], ids=lambda one: one.sampler
)
def test_every_field_of_every_scheduler_that_is_read_is_known(fields, kind):
    assert [name for name in parameters(kind) if name not in known(fields)] == []


@pytest.mark.parametrize(
    ("fields", "kind"), [(FLOW_FIELDS, "FlowMatchEulerDiscreteScheduler"), (NOISING_FIELDS, "DDPMScheduler")]
)
def test_so_is_that_of_a_flow_and_of_the_noising(fields, kind):
    assert [name for name in parameters(kind) if name not in known(fields)] == []


def known(fields: Fields) -> set[str]:
    assert not fields.followed & fields.idle
    assert not set(fields.values) & (fields.followed | fields.idle)
    return {*fields.followed, *fields.values, *fields.idle}


FOLLOWED: list[dict[str, Any]] = [
    {},
    {"num_train_timesteps": 500},
    {"beta_start": 0.002},
    {"beta_end": 0.02},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"set_alpha_to_one": False},
    {"set_alpha_to_one": True},
    {"steps_offset": 0},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction"},
    {"thresholding": True},
    {"thresholding": True, "clip_sample": True},
    {"thresholding": True, "sample_max_value": 1.7},
    {"thresholding": True, "sample_max_value": 9.0, "dynamic_thresholding_ratio": 0.6},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
]
IDLE: dict[type, list[dict[str, Any]]] = {
    DDIMScheduler: [{"clip_sample_range": 0.1}, {"sample_max_value": 2.0}, {"dynamic_thresholding_ratio": 0.5}],
    PNDMScheduler: [{"skip_prk_steps": True}, {"skip_prk_steps": False}],
    EulerDiscreteScheduler: [{"interpolation_type": "log_linear"}, {"interpolation_type": "linear"}],
    DDPMScheduler: [{"variance_type": "learned_range"}],
}


def ids(change: dict[str, Any]) -> str:
    return ",".join(f"{name}={str(value)[:12]}" for name, value in change.items()) or "none"


@pytest.mark.parametrize("change", FOLLOWED, ids=ids)
@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DDPMScheduler])
def test_ddim_steps_are_those_of_diffusers_on_the_same_config(tmp_path, kind, change):
    config = SD | {"clip_sample": False, "_class_name": kind.__name__} | change
    kind.from_config(config).save_pretrained(tmp_path / "scheduler")
    written = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    stock = DDIMScheduler.from_config(kind.from_config(written).config)
    stock.set_timesteps(COUNT)
    sampler = read_ddim(tmp_path)
    assert largest_difference(sampler, stock) < 1e-5
    if kind is DDIMScheduler:  # whose defaults are those of the sampler
        plain = read_ddim(folder_of(tmp_path, SD | {"clip_sample": False}))
        assert torch.equal(result(sampler), result(plain)) == (change in ({}, {"set_alpha_to_one": True}))


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind, changes in IDLE.items() for change in changes], ids=str
)
def test_idle_fields_change_nothing_here_nor_in_diffusers(tmp_path, kind, change):
    config = SD | {"clip_sample": False, "_class_name": kind.__name__}
    plain, sampler = (read_ddim(folder_of(tmp_path, config | more)) for more in ({}, change))
    assert torch.equal(result(sampler), result(plain))
    stock = DDIMScheduler.from_config(kind.from_config(config | change).config)
    stock.set_timesteps(COUNT)
    assert largest_difference(sampler, stock) < 1e-5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_karras_sigmas": True}, r"use_karras_sigmas is True, which DDIM, .*allowed: False, None\. "),
    ({"use_exponential_sigmas": True}, "use_exponential_sigmas is True"),
    ({"use_beta_sigmas": True}, "use_beta_sigmas is True"),
    ({"use_lu_lambdas": True}, "use_lu_lambdas is True"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas is True"),
    ({"use_dynamic_shifting": True}, "use_dynamic_shifting is True"),
    ({"timestep_type": "continuous"}, "timestep_type is 'continuous', .*allowed: 'discrete'"),
    ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type is 'sigma_min'"),
    ({"final_sigmas_type": None}, "final_sigmas_type is None"),
    ({"timestep_spacing": None}, "timestep_spacing is None"),
    ({"sigma_min": 0.002}, "sigma_min is 0.002"),
    ({"sigma_max": 80.0}, "sigma_max is 80.0"),
    ({"shift_terminal": 0.1}, "shift_terminal is 0.1"),
    ({"lambda_min_clipped": -5.1}, "lambda_min_clipped is -5.1"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', .*allowed: 'linear', 'scaled_linear', 'squared"),
    ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction', .*'v_prediction'"),
    ({"timestep_spacing": "log"}, "timestep_spacing is 'log', .*allowed: 'leading', 'trailing', 'linspace'"),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 numbers, and num_train_timesteps is 1000"),
    ({"beta_start": "much"}, "DDIMScheduler: "),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatchEuler.*DDIM reads: DDIMScheduler"),
    ({"_class_name": "EDMEulerScheduler"}, "_class_name is 'EDMEulerScheduler'"),
    ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "rescale_betas_zero_snr is True, but .*epsilon"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda one: ids(one) if isinstance(one, dict) else "")
def test_values_that_ddim_cannot_do_are_refused(tmp_path, change, message):
    folder = folder_of(tmp_path, SD | change)
    with pytest.raises(GeneratorError, match=message):
        read_ddim(folder)


NULL = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas",
    "use_dynamic_shifting", "timestep_type", "shift_terminal", "sigma_min", "sigma_max", "clip_sample", "thresholding",
    "rescale_betas_zero_snr", "trained_betas",
)  # fmt: skip


@pytest.mark.parametrize("name", NULL)
def test_null_is_off_as_in_diffusers(tmp_path, name):
    config = SD | {"clip_sample": False}
    plain, sampler = (read_ddim(folder_of(tmp_path, config | more)) for more in ({}, {name: None}))
    assert torch.equal(result(sampler), result(plain))
    stock = DDIMScheduler.from_config(config | {name: None})
    stock.set_timesteps(COUNT)
    assert largest_difference(sampler, stock) < 1e-5


def test_a_flows_null_is_off_as_in_diffusers(tmp_path):
    change = dict.fromkeys(("stochastic_sampling", "use_flow_sigmas", "use_dynamic_shifting", "invert_sigmas"))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(change)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / COUNT, COUNT))
    assert largest_difference(FlowEuler(folder_of(tmp_path, change)), scheduler, divide=1000) < 1e-5


def test_a_spacing_of_the_generators_own_makes_the_configs_idle(tmp_path):
    folder = folder_of(tmp_path, SD | {"clip_sample": False})
    plain = result(read_ddim(folder, "trailing"))
    folder_of(tmp_path, SD | {"clip_sample": False, "use_karras_sigmas": True, "timestep_spacing": "linspace"})
    assert torch.equal(result(read_ddim(folder, "trailing")), plain)
    folder_of(tmp_path, SD | {"use_flow_sigmas": True})
    with pytest.raises(GeneratorError, match="use_flow_sigmas is True"):
        read_ddim(folder, "trailing")


def test_a_field_of_a_newer_diffusers_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read_ddim(folder_of(tmp_path, SD | {"clip_sample": False, "wobble": 0.5, "_diffusers_version": "9.9"}))
    (record,) = caplog.records
    assert "scheduler_config.json: the field wobble (0.5) is not known" in record.getMessage()


LIMITED = [{}, {"clip_sample": True}, {"thresholding": True, "sample_max_value": 1.4}, {"timestep_scaling": 3.0}]


@pytest.mark.parametrize(
    "change",
    [
        *LIMITED,
        {"prediction_type": "v_prediction"},
        {"original_inference_steps": 40},
        {"beta_end": 0.02},
        {"set_alpha_to_one": False, "steps_offset": 3, "timestep_spacing": "trailing", "use_karras_sigmas": True},
    ],
    ids=ids,
)
@pytest.mark.parametrize("kind", [LCMScheduler, TCDScheduler])
def test_few_step_samplers_follow_a_config_as_diffusers_does(tmp_path, monkeypatch, kind, change):
    noise = [torch.randn(FIRST.shape, generator=torch.Generator().manual_seed(n)) for n in range(COUNT - 1)]
    folder = folder_of(tmp_path, SD | change)
    stock = kind.from_config(SD | change)
    stock.set_timesteps(COUNT)
    left = iter(noise)
    monkeypatch.setattr(sys.modules[kind.__module__], "randn_tensor", lambda *_, **__: next(left))
    if kind is LCMScheduler:
        sampler = LCM(folder)
        assert sampler.facts == (["limited"] if {"clip_sample", "thresholding"} & set(change) else [])
        assert largest_difference(sampler, stock, noise=noise) < 1e-5
    else:
        assert largest_difference(TCD(folder, 0.4), stock, noise=noise, eta=0.4) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type is 'sample', .*allowed: 'epsilon', 'v_prediction'"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is True, which LCM"),
        ({"rescale_betas_zero_snr": True}, "undefined at zero terminal SNR"),
    ],
)
def test_what_few_step_samplers_cannot_do_is_refused(tmp_path, change, message):
    with pytest.raises(GeneratorError, match=message):
        LCM(folder_of(tmp_path, SD | change))


@pytest.mark.parametrize(
    "change",
    [
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift": 3.0},
        {"num_train_timesteps": 500},
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"base_shift": 0.1, "max_shift": 9.0, "base_image_seq_len": 8, "max_image_seq_len": 9},
    ],
    ids=ids,
)
def test_a_flow_follows_its_config_as_diffusers_does(tmp_path, change):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(change)
    mu = compute_empirical_mu(image_seq_len=36, num_steps=COUNT)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / COUNT, COUNT), mu=mu)
    assert largest_difference(FlowEuler(folder_of(tmp_path, change)), scheduler, divide=1000) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stochastic_sampling": True}, "stochastic_sampling is True, which Euler, .*allowed: False"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"time_shift_type": "cubic"}, "time_shift_type is 'cubic', .*'exponential', 'linear'"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "_class_name is"),
    ],
)
def test_what_a_flow_cannot_do_is_refused(tmp_path, change, message):
    with pytest.raises(GeneratorError, match=message):
        FlowEuler(folder_of(tmp_path, change))


def test_fields_of_the_noising_of_embeddings_are_read_as_diffusers_does(tmp_path):
    config = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True, "thresholding": True}
    assert read_scheduler(folder_of(tmp_path, config), NOISING_FIELDS) == config
    with pytest.raises(GeneratorError, match="beta_schedule is 'wave'"):
        read_scheduler(folder_of(tmp_path, {"beta_schedule": "wave"}), NOISING_FIELDS)


def test_images_of_a_model_with_thresholding_are_the_stock_pipelines_and_have_another_name(tmp_path):
    folder = build_tiny_unclip(tmp_path / "tiny")
    settings = {"model": str(folder), "num_inference_steps": 4, "guidance_scale": 3.0}
    before = StableUnCLIP(StableUnCLIPConfig(**settings), CPU).spec.fingerprint
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"thresholding": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generator = StableUnCLIP(StableUnCLIPConfig(**settings), CPU)
    embedding = torch.randn((1, 32), generator=torch.Generator().manual_seed(3))
    made = generator.generate(embedding, [9], [generator.spec.defaults])[0].numpy().astype(int)
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator("cpu").manual_seed(9)
    image = pipeline(
        image_embeds=embedding, prompt="", num_inference_steps=4, guidance_scale=3.0, generator=noise
    ).images[0]
    assert np.abs(made - np.asarray(image).transpose(2, 0, 1)).max() <= 1
    assert generator.spec.fingerprint != before
    facts = ("stable_unclip/1", "float32", "zero_snr=True", "preprocess=clip/2")
    assert generator.spec.fingerprint != fingerprint_folder(folder, *facts), "of when thresholding was passed over"
