"""`genssl show`"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from genssl.base.wording import counted
from genssl.cli.options import Overrides, RecipeArgument

if TYPE_CHECKING:
    from genssl.config.recipe import Recipe


def show(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print a recipe or server file with every default filled in and every override applied, as YAML.

    For a recipe, comments at the end say what follows from it: the learning rate at its peak, and the batch of a rank
    and of a micro-batch. Started by torchrun, or with WORLD_SIZE set, it is for so many ranks.

    \b
    genssl show cifar10/simclr train.batch_size=512
    genssl show servers/digits_unclip.yaml
    """
    from genssl.config.documents.document import apply_override, read_document
    from genssl.config.documents.dump import to_yaml
    from genssl.config.load import model_of
    from genssl.config.recipe import Recipe
    from genssl.config.validate import validate

    document = read_document(recipe)
    for override in overrides or []:
        apply_override(document, override)
    validated = validate(model_of(document), document)
    print(to_yaml(validated), end="")
    if isinstance(validated, Recipe):
        for line in follows(validated, int(os.environ.get("WORLD_SIZE", "1"))):
            print(f"# {line}")


def follows(recipe: Recipe, ranks: int) -> list[str]:
    """Returns what a recipe's numbers come to, a line each.

    Args:
        recipe: of a run.
        ranks: processes that share a batch.
    """
    optimizer, batch, parts = recipe.optimizer, recipe.train.batch_size, recipe.train.accumulate
    peak = optimizer.lr * batch / 256 if optimizer.lr_rule == "linear" else optimizer.lr
    how = f"{optimizer.lr:g} * {batch} / 256" if optimizer.lr_rule == "linear" else "optimizer.lr as it is"
    warmup = counted(recipe.schedule.warmup_epochs, "epoch")
    lines = [f"learning rate at its peak: {peak:g} ({how}), after {warmup} of warm-up"]
    if batch % (ranks * parts):
        micro = counted(parts, "micro-batch", "micro-batches")
        lines.append(f"batch per rank: {batch} images do not divide among {counted(ranks, 'rank')} in {micro}")
        return lines
    each = batch // ranks
    micro = f", in {parts} micro-batches of {each // parts}" if parts > 1 else ""
    lines.append(f"batch per rank: {each} images{micro} ({batch} over {counted(ranks, 'rank')})")
    return lines
