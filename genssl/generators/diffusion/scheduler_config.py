"""What becomes of every field of a diffusers scheduler config: it is followed, or refused, or cannot change results.

A generator has a sampler of its own (DDIM, LCM, TCD, Euler steps of a flow), whatever scheduler a folder names, as a
stock pipeline has after `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`. Fields that only say how
another solver goes about its steps mean nothing to it. Fields that say at which noise levels a model is sampled are
followed or refused, since images would be others than the folder asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genssl.errors import GeneratorError
from genssl.generators.diffusion.loading import quiet_libraries
from genssl.generators.models import read_json

log = logging.getLogger(__name__)

Values = Mapping[str, tuple[Any, ...]]

PROCESS = frozenset({"num_train_timesteps", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr"})
LIMITS = frozenset(
    {"clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
)
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
# diffusers asks of these whether they are true; null in place of a word it mostly refuses.
OFF = (False, None)
# Another noise process than that of `PROCESS`.
PLAIN: Values = {
    "timestep_type": ("discrete", None),
    "use_flow_sigmas": OFF,
    "use_dynamic_shifting": OFF,
    "shift_terminal": (None,),
}
# Other noise levels on the way than `timestep_spacing` names.
SPACED: Values = {
    "use_karras_sigmas": OFF,
    "use_exponential_sigmas": OFF,
    "use_beta_sigmas": OFF,
    "use_lu_lambdas": OFF,
    "lambda_min_clipped": (float("-inf"), None),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
}
SOLVER = frozenset(
    {
        "skip_prk_steps", "variance_type", "interpolation_type", "solver_order", "solver_type", "algorithm_type",
        "lower_order_final", "euler_at_final", "predict_x0", "disable_corrector", "solver_p", "noise_sampler_seed",
        "flow_shift", "time_shift_type",  # which only `use_flow_sigmas` and `use_dynamic_shifting` read
        "original_inference_steps", "timestep_scaling",  # of distilled models
    }
)  # fmt: skip
# Schedulers over such a process, of which every field is known here.
DIFFUSION = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
    "LCMScheduler", "TCDScheduler",
)  # fmt: skip


@dataclass(frozen=True)
class Fields:
    """What a sampler makes of the fields of a config.

    Attributes:
        sampler: its name, for messages.
        classes: of the schedulers whose configs it reads.
        followed: fields whose every value it follows.
        values: fields of which it can do these values; of those with one, or `OFF`, that changes nothing.
        idle: fields that cannot change its results.
    """

    sampler: str
    classes: tuple[str, ...]
    followed: frozenset[str]
    values: Values
    idle: frozenset[str] = field(default=frozenset())


DDIM_FIELDS = Fields(
    "DDIM",
    DIFFUSION,
    PROCESS | LIMITS | {"set_alpha_to_one", "steps_offset"},
    {
        "beta_schedule": BETAS,
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": ("leading", "trailing", "linspace"),
        **PLAIN,
        **SPACED,
    },
    SOLVER,
)
# Where the generator's block names the spacing, that of the config does not count.
SPACED_DDIM_FIELDS = Fields(
    "DDIM",
    DIFFUSION,
    DDIM_FIELDS.followed,
    {name: values for name, values in DDIM_FIELDS.values.items() if name not in {"timestep_spacing", *SPACED}},
    SOLVER | {"timestep_spacing", *SPACED},
)
# A distilled model has time steps of its own.
_DISTILLED = SOLVER - {"original_inference_steps", "timestep_scaling"} | {
    "set_alpha_to_one", "steps_offset", "timestep_spacing", *SPACED,
}  # fmt: skip
_DISTILLED_VALUES: Values = {"beta_schedule": BETAS, "prediction_type": ("epsilon", "v_prediction"), **PLAIN}
LCM_FIELDS = Fields(
    "LCM",
    DIFFUSION,
    PROCESS | LIMITS | {"original_inference_steps", "timestep_scaling"},
    _DISTILLED_VALUES,
    _DISTILLED,
)
TCD_FIELDS = Fields(
    "TCD",
    DIFFUSION,
    PROCESS | {"original_inference_steps"},
    _DISTILLED_VALUES,
    _DISTILLED | LIMITS | {"timestep_scaling"},
)
# unCLIP's noise on embeddings: a level is named outright, and no step is taken.
NOISING_FIELDS = Fields(
    "the noising of embeddings",
    ("DDPMScheduler",),
    PROCESS,
    {"beta_schedule": (*BETAS, "laplace", "exp", "sigmoid")},
    LIMITS | {"variance_type", "prediction_type", "timestep_spacing", "steps_offset"},
)
FLOW_FIELDS = Fields(
    "Euler",
    ("FlowMatchEulerDiscreteScheduler",),
    frozenset(
        {
            "num_train_timesteps", "shift", "use_dynamic_shifting", "invert_sigmas", "shift_terminal",
            "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
        }
    ),
    {"time_shift_type": ("exponential", "linear"), "stochastic_sampling": OFF, "use_flow_sigmas": OFF},
    # FLUX.2 works its shift out by a rule of its own.
    frozenset({"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}),
)  # fmt: skip


def read_scheduler(folder: Path, fields: Fields, part: str = "scheduler") -> dict[str, Any]:
    """Returns the scheduler's config in a sub-folder as it stands, and warns of fields that are not known here.

    Raises:
        GeneratorError: if it is missing or broken, of another kind of scheduler, or has a value that the sampler, of
            which `fields` tell, cannot do.
    """
    path = folder / part / "scheduler_config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    if kind is not None and kind not in fields.classes:
        raise GeneratorError(f"{path}: _class_name is {kind!r}; {fields.sampler} reads: {', '.join(fields.classes)}")
    for name, value in config.items():
        if name in fields.values:
            if value not in fields.values[name]:
                allowed = ", ".join(repr(one) for one in fields.values[name])
                raise GeneratorError(
                    f"{path}: {name} is {value!r}, which {fields.sampler}, the sampler here, cannot do; allowed: "
                    f"{allowed}. Images would be others than this folder asks for: take a model with another "
                    "scheduler, or set the value in a copy of the folder and check the images"
                )
        elif name not in fields.followed | fields.idle and not name.startswith("_"):
            log.warning(
                "%s: the field %s (%r) is not known to this genssl, which leaves it aside; if it changes images in the "
                "diffusers that wrote it, those made here are others",
                *(path, name, value),
            )
    betas, count = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if betas is not None and len(betas) != count:
        raise GeneratorError(
            f"{path}: trained_betas has {len(betas)} numbers, and num_train_timesteps is {count}; as many are needed"
        )
    return config


def build_scheduler(kind: Any, folder: Path, config: Mapping[str, Any], part: str = "scheduler") -> Any:
    """Returns diffusers' scheduler `kind` of a config; raises GeneratorError for values that it cannot take."""
    try:
        with quiet_libraries():
            return kind.from_config(dict(config))
    except (ArithmeticError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise GeneratorError(f"{folder / part / 'scheduler_config.json'}: {kind.__name__}: {reason}") from None


def check_first_step(folder: Path, scheduler: Any) -> None:
    """Raises GeneratorError if steps that begin at the last time step begin where a predicted epsilon says nothing."""
    if scheduler.config["prediction_type"] == "epsilon" and float(scheduler.alphas_cumprod[-1]) == 0:
        raise GeneratorError(
            f"{folder / 'scheduler' / 'scheduler_config.json'}: rescale_betas_zero_snr is True, but the model predicts "
            "epsilon, which is undefined at zero terminal SNR, where its steps begin; allowed: False, or True with "
            "prediction_type 'v_prediction'. Set False in a copy of the folder"
        )
