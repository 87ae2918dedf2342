"""What a run trains on, and what it is judged on."""

from __future__ import annotations

from dataclasses import dataclass

from genssl.base.devices import pick_device
from genssl.config.base import ComponentConfig
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.data.load import hold_out, labels_note, load_dataset
from genssl.errors import ConfigError
from genssl.evaluators.base import EvaluationData
from genssl.evaluators.run import able
from genssl.variants.in_process import GeneratedVariants


@dataclass
class Splits:
    """The images of a run.

    Attributes:
        train: what is trained on.
        held_out: the part of train that is not, if the recipe holds one out.
        evaluation: what the evaluators need, if there are any.
        evaluators: the recipe's that these images can be judged by: on those of a data set that found no labels when
            it looked for them by itself, the others are left out.
        notes: what the user is told.
    """

    train: ImageDataset
    held_out: ImageDataset | None
    evaluation: EvaluationData | None
    evaluators: list[ComponentConfig]
    notes: list[str]


def load_splits(recipe: Recipe) -> Splits:
    """Loads the train split, and what the evaluators need if there are any.

    Raises:
        UserError: if the recipe's data cannot be had, or do not suffice for its batch or its evaluators.
    """
    train = load_dataset(recipe.dataset, "train")
    test_name = "test"
    held_out: ImageDataset | None = None
    if recipe.train.validation_fraction > 0:
        train, held_out = hold_out(train, recipe.train.validation_fraction)
        test_name = f"validation ({recipe.train.validation_fraction:g} of train)"
    if recipe.train.batch_size > len(train):
        raise ConfigError(
            [f"train.batch_size: {recipe.train.batch_size} is more than the {len(train)} training images; lower it"]
        )
    found = labels_note(train)
    notes = [] if found is None else [found]
    if not recipe.evaluate:
        return Splits(train, held_out, None, [], notes)
    # The generator is loaded when an evaluator asks for variants, and not before.
    variants = None if recipe.generator is None else GeneratedVariants(recipe, pick_device(recipe.train.device))
    evaluation = EvaluationData(train, held_out or load_dataset(recipe.dataset, "test"), test_name, variants)
    evaluators, left_out = able(recipe.evaluate, evaluation)
    notes += [left_out] if left_out else []
    return Splits(train, held_out, evaluation, evaluators, notes)
