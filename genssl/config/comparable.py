"""Which settings decide what a run gives, and which may differ between runs that are one and the same."""

from __future__ import annotations

import json
from typing import Any

from genssl.config.recipe import Recipe

# When it saves and what it logs; numbers, memory order, devices and threads do decide, if only in the last bit.
SAVING = {"checkpoint_every_epochs", "checkpoint_every_steps", "keep_checkpoints", "loggers"}
# Credentials, and how long it waits before it gives up.
OF_THE_CONNECTION = {"token_file", "tls", "deadline_seconds"}
# What evaluators that make variants go by, whether the training has variants or not.
OF_EVALUATORS = {"buckets", "batching"}
# What says which views are variants, and how these are augmented.
OF_VARIANTS = {"policy", "probability", "third_count", "real_weight", "generated_augmentation"}


def deciding(recipe: Recipe) -> dict[str, Any]:
    """Returns the settings that decide the weights, metrics and counts of a run, as JSON has them.

    In doubt a setting decides. Those do not that only say when a run saves and logs, that no view is made by (all of
    the variants' in a run without them), and where a server is, as long as the training waits for every variant: what a
    server sends is a function of source, generator, parameters and index, and how fast it is changes nothing then.
    """
    found = recipe.model_dump(mode="json")
    for name in SAVING:
        del found["train"][name]
    variants = found["variants"]
    if not recipe.uses_variants():
        found["variants"] = {"source": "none"} | {name: variants[name] for name in OF_EVALUATORS}
        for name in OF_VARIANTS:
            del found["views"][name]
        return found
    for name in OF_THE_CONNECTION:
        del variants[name]
    if recipe.variants.source != "online":
        del variants["server"]
    elif recipe.variants.late == "block" and recipe.variants.targets:
        variants["server"] = "a server"
    return found


def baseline_of(recipe: Recipe) -> dict[str, Any]:
    """Returns what decides the run that differs from the recipe in having no variants, but for name and generator.

    Runs without variants whose `baseline_of` are equal are the same baseline.
    """
    variants = recipe.variants.model_copy(update={"source": "none"})
    found = deciding(recipe.model_copy(update={"variants": variants}))
    del found["variants"], found["generator"], found["name"]
    return found


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Returns a text for each value that two documents differ in: `key.path before (now: now)`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            text
            for key in keys
            if before.get(key) != now.get(key)
            for text in differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [f"{path} {_shown(before)} (now: {_shown(now)})"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
