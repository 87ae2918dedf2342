#!/usr/bin/env bash
# diffusers 0.42.1: DDIMScheduler with timestep_spacing "trailing" makes one step too many at 62 counts of 1 to 1000.
#
# The time steps are counted down from 1000 by the float 1000 / n (np.arange(1000, 0, -1000 / n)). Where rounding leaves
# the last one just above 0 (n = 61, 103, 121, ..., 998) it becomes the time step -1, after the one that leads to the
# image. The pipelines take it as they take the others: alphas_cumprod[-1] is the noise level of the *noisiest* step,
# and with zero terminal SNR the finished latents are thrown away for what the network says of them there. Trailing
# spacing with zero terminal SNR is what the paper behind it recommends (Lin et al. 2024, arXiv 2305.08891), and nothing
# warns. A guess that `len(scheduler.timesteps) == n`, as everywhere else, is wrong.
#
# Seen, with a "network" that knows the image (v-prediction, latents of 0.5), so that every sampler ends at 0.5:
#   60 steps: 60 time steps, the last 16, ends at 0.50
#   61 steps: 62 time steps, the last -1, at 0.50 before it; after it, whatever the network says: -0.70 and -0.70, of the
#             image and of one of zeros alike
#   62 counts of 1..1000 are like 61: [61, 103, 121, 122] ... 998
#
# Exits with 1 if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "diffusers==0.42.1" "torch==2.14.1" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers import DDIMScheduler

print("diffusers", diffusers.__version__, "torch", torch.__version__)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        clip_sample=False,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    )


def sample(count: int) -> tuple[DDIMScheduler, torch.Tensor]:
    """Follows the time steps of 0 and more."""
    one = scheduler()
    one.set_timesteps(count)
    image = torch.full((1, 1, 8, 8), 0.5)
    latents = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    for time in one.timesteps[one.timesteps >= 0]:
        alpha = one.alphas_cumprod[time]
        noise = (latents - alpha**0.5 * image) / (1 - alpha) ** 0.5
        velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * image
        latents = one.step(velocity, time, latents).prev_sample
    return one, latents


one, latents = sample(60)
print(f"60 steps: {len(one.timesteps)} time steps, the last {one.timesteps[-1]}, ends at {latents.mean():.2f}")
as_seen = len(one.timesteps) == 60 and one.timesteps[-1] == 16 and abs(latents.mean() - 0.5) < 0.02
one, latents = sample(61)
said = torch.full_like(latents, 0.7)
after = [float(one.step(said, one.timesteps[-1], before).prev_sample.mean()) for before in (latents, latents * 0)]
print(f"61 steps: {len(one.timesteps)} time steps, the last {one.timesteps[-1]}, at {latents.mean():.2f} before it; after")
print(f"          it, whatever the network says: {after[0]:.2f} and {after[1]:.2f}, of the image and of zeros alike")
as_seen &= len(one.timesteps) == 62 and one.timesteps[-1] == -1 and abs(latents.mean() - 0.5) < 0.02
as_seen &= after[0] == after[1] and abs(after[0] + 0.7) < 1e-5
wrong = []
for count in range(1, 1001):
    one = scheduler()
    one.set_timesteps(count)
    if len(one.timesteps) != count:
        wrong.append(count)
print(len(wrong), "counts of 1..1000 are like 61:", wrong[:4], "...", wrong[-1])
raise SystemExit(0 if as_seen and len(wrong) == 62 else 1)
PYTHON
