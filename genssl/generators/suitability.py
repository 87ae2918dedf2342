"""Whether a generator suits the images it is given: what a built-in one was trained on, and how large variants are."""

from __future__ import annotations

from genssl.generators.models import BUILTIN, read_json

CARD = "card.json"
OTHERS = (
    "make one of your own images with `genssl train-generator recipes/generators/folder_flow.yaml dataset.root=FOLDER "
    "--out my-flow` and name {name: flow, model: my-flow} in its place, or name another generator"
)


def trained_on(model: str) -> str | None:
    """Returns the registry name of the data set that a built-in model was trained on; None for any other model.

    Args:
        model: as a config or a server names it, such as "builtin:digits-flow".
    """
    name = model.removeprefix("builtin:")
    card = BUILTIN / name / CARD
    if name == model or "/" in name or not card.is_file():
        return None
    return str(read_json(card)["dataset"]["name"])


def foreign_data(model: str, found: str) -> str:
    """Says that a built-in model was not trained on what was `found`, and what to use instead."""
    return (
        f"{model} was trained on the data set {trained_on(model)} alone and makes such images of whatever it is given, "
        f"but {found}; {OTHERS}"
    )


def small_variants(variant: int, view: int) -> str | None:
    """Says that variants of so many pixels (short side) are smaller than views of so many; None if they are not."""
    if variant >= view:
        return None
    return (
        f"the variants have {variant} pixels a side and the views {view}, so that they are enlarged and lack what "
        "real images show; raise the generator's output_size or image_size where it has one, lower the size of the "
        "views, or name another generator (`genssl train-generator` makes one of your own images)"
    )
