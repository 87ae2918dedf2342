"""Every sampler makes exactly the number of steps that it is asked for, at every count that it lets through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from genssl.generators.diffusion.few_step import LCM, TCD
from genssl.generators.diffusion.flux2_klein import FlowEuler
from genssl.generators.diffusion.sampling import DDIM, Sampler, read_ddim, row_noise

TRAINED = 1000
SPACINGS = ("trailing", "leading", "linspace")


def folder_of(path: Path, **config) -> Path:
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_makes_as_many_steps_as_asked_and_those_of_diffusers(spacing, offset):
    stock = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, clip_sample=False)
    ddim, mended = DDIM(DDIMScheduler.from_config(stock.config)), []
    assert ddim.most_steps == TRAINED - (spacing == "leading" and offset)
    for count in range(1, ddim.most_steps + 1):
        stock.set_timesteps(count)
        expected = stock.timesteps.tolist()
        if len(expected) != count:
            mended.append(count)
            assert expected.pop() == -1, "which is no time step"
        assert [step.timestep for step in ddim.steps(count)] == expected
        assert len(expected) == count
        assert TRAINED > expected[0] >= expected[-1] >= 0
    # If diffusers has fewer of them one day, the cut that mends them can go.
    assert (len(mended), mended[:3], mended[-1:]) == (
        (62, [61, 103, 121], [998]) if spacing == "trailing" else (0, [], [])
    )


def test_the_last_step_of_a_mended_count_leads_to_the_image():
    ddim = DDIM(DDIMScheduler(timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False))
    for count in (61, 103, 121, 998):
        assert ddim.steps(count)[-1].alpha_next > 0.999, "as at other counts, there is next to no noise after it"


def samplers(path: Path) -> list[Sampler]:
    folder = folder_of(path, num_train_timesteps=TRAINED, prediction_type="epsilon", steps_offset=1)
    return [*(read_ddim(folder, one) for one in (None, *SPACINGS)), LCM(folder), TCD(folder, 0.3)]


def test_the_samplers_of_the_other_generators_do_too(tmp_path):
    found = samplers(tmp_path)
    assert [sampler.most_steps for sampler in found] == [999, 1000, 999, 1000, 50, 50]
    for sampler in found:
        # DDIM's counts are all tried above; here those that were one too many, and the ends.
        for count in sorted(
            {*range(1, min(62, sampler.most_steps + 1)), min(998, sampler.most_steps), sampler.most_steps}
        ):
            steps = sampler.steps(count, 8)
            assert len(steps) == count
            assert all(0 <= step.timestep < TRAINED for step in steps)


def test_a_flow_does_too(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    folder = folder_of(tmp_path, **dict(scheduler.config))
    flow = FlowEuler(folder)
    for count in range(1, flow.most_steps + 1):
        steps = flow.steps(count, 16)
        assert len(steps) == count
        assert sum(step.length for step in steps) == pytest.approx(-1, abs=1e-4)


def test_noise_follows_from_the_low_32_bits_of_a_seed():
    """What the documentation of `VariantKey.seed` says of torch's CPU generator; if it changes, so do all variants."""
    for seed in (0, 5, 2**32 - 1):
        first, same, other = row_noise([seed, seed + 2**32 * 3, seed ^ 2], (4, 8, 8))[0]
        assert first.equal(same)
        assert not first.equal(other)
