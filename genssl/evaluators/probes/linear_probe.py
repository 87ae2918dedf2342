"""Linear classification of frozen features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from genssl.base.devices import stream
from genssl.data.base import ImageDataset
from genssl.errors import DataError, UserError
from genssl.evaluators.base import EvaluationData, EvaluatorBase, Features, FrozenEncoder
from genssl.evaluators.configs import LinearProbeConfig
from genssl.evaluators.probes.linear_heads import LinearHeads, standardisation
from genssl.views.augment import Augment
from genssl.views.read import augmented

Rows = npt.NDArray[np.int64]


def linear_classifier(penalty: float) -> Pipeline:
    """Returns standardisation followed by multinomial logistic regression (L-BFGS) with inverse penalty `penalty`."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))


def split_off(labels: npt.NDArray[np.int64], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Returns the rows to fit on and those held out, stratified.

    Raises:
        DataError: if a part would have fewer images than there are classes.
    """
    try:
        fit, held_out = train_test_split(np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels)
    except ValueError as error:
        raise DataError(
            f"evaluate: held_out: {fraction} of {len(labels)} train images cannot be held out with every class on both "
            f"sides ({error}); change held_out, or give more labelled images"
        ) from None
    return fit, held_out


@dataclass
class FittedProbe:
    """A classifier fitted on all of train, and how its penalty was chosen."""

    classifier: Pipeline
    protocol: dict[str, Any]


def fit_linear_probe(train: Features, penalties: list[float], held_out: float, seed: int) -> FittedProbe:
    """Chooses the penalty on a held-out part of train, and fits the classifier on all of it."""
    x, y = train.features.numpy(), train.labels.numpy()
    fit, held = split_off(y, held_out, seed)
    scores = {penalty: linear_classifier(penalty).fit(x[fit], y[fit]).score(x[held], y[held]) for penalty in penalties}
    chosen = max(scores, key=lambda penalty: (scores[penalty], -penalty))
    protocol = {
        "classifier": "logistic regression on standardised features, L-BFGS",
        "inverse_penalty": chosen,
        "chosen_among": penalties,
        "chosen_on": f"{len(held)} held-out train images, seed {seed}",
        "trained_on": len(y),
    }
    return FittedProbe(linear_classifier(chosen).fit(x, y), protocol)


class LinearProbe(EvaluatorBase[LinearProbeConfig]):
    """The settings are chosen on a held-out part of train, then the probe is fitted on all of it; test is used once."""

    Config = LinearProbeConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if a class is too small to be split."""
        data.require_per_class(2, "evaluate.linear_probe")

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields ("top1", accuracy)."""
        train, test = encoder.features(data.train), encoder.features(data.test)
        if self._config.optimizer == "lbfgs":
            probe = fit_linear_probe(train, self._config.penalties, self._config.held_out, self._config.seed)
            self.protocol = probe.protocol
            accuracy = float(probe.classifier.score(test.features.numpy(), test.labels.numpy()))
        else:
            heads, self.protocol = self._train(encoder, data, train, self._config.optimizer)
            accuracy = heads.accuracies(test.features, test.labels)[0]
        self.protocol |= {"tested_on": data.test_name, "tested": len(test.labels)}
        yield "top1", accuracy

    def _train(
        self, encoder: FrozenEncoder, data: EvaluationData, train: Features, rule: Literal["sgd", "lars"]
    ) -> tuple[LinearHeads, dict[str, Any]]:
        """Trains a head for every candidate on a part of train, then one with the chosen settings on all of it."""
        config = self._config
        fit, held_out = split_off(train.labels.numpy(), config.held_out, config.seed)
        candidates = [(rate, decay) for rate in config.rates() for decay in config.weight_decays]

        def trained(rows: Rows, settings: list[tuple[float, float]]) -> LinearHeads:
            batches = max(1, len(rows) // config.batch_size)
            mean, deviation = standardisation(train.features, torch.from_numpy(rows))
            heads = LinearHeads(
                dim=train.features.shape[1],
                classes=data.num_classes,
                rates=[rate for rate, _ in settings],
                decays=[decay for _, decay in settings],
                rule=rule,
                trust=config.trust_coefficient,
                mean=mean,
                deviation=deviation,
                steps=config.epochs * batches,
                seed=config.seed,
                device=encoder.device,
            )
            source = _Augmented(encoder, data.train, config) if config.features == "augmented" else train
            for epoch in range(config.epochs):
                order = torch.randperm(len(rows), generator=stream("linear_probe", config.seed, epoch)).numpy()
                for number, part in enumerate(np.array_split(order, batches)):
                    batch = rows[part]
                    features = (
                        source.batch(batch, epoch, number)
                        if isinstance(source, _Augmented)
                        else source.features[torch.from_numpy(batch)]
                    )
                    heads.step(features, train.labels[torch.from_numpy(batch)])
            return heads

        everything = np.arange(len(train.labels))
        alone = len(candidates) == 1  # nothing to choose: the fit on all of train is the only one
        heads = trained(everything if alone else fit, candidates)
        finite = [bool(weights.isfinite().all()) for weights in heads.weights]
        if not any(finite):
            raise UserError(
                f"evaluate.linear_probe: training diverged with every one of the {len(candidates)} settings; lower "
                f"learning_rates (they are {config.rates()}) or weight_decays (they are {config.weight_decays})"
            )
        chosen: dict[str, Any] = {"chosen_on": "nothing: there is one candidate"}
        best = 0
        if not alone:
            scores = heads.accuracies(train.features, train.labels, torch.from_numpy(held_out))
            # Of equal ones the smaller rate and the larger decay.
            ranks = [(finite[i], scores[i], decay, -rate) for i, (rate, decay) in enumerate(candidates)]
            best = ranks.index(max(ranks))
            heads = trained(everything, [candidates[best]])
            where = f"{len(held_out)} held-out train images, seed {config.seed}"
            chosen = {"chosen_on": where, "accuracy_there": scores[best]}
        rate, decay = candidates[best]
        return heads, {
            "classifier": f"softmax regression on standardised features, {rule}, momentum 0.9, cosine to 0",
            "features": config.features,
            **({"augmentation": config.augmentation.settings()} if config.features == "augmented" else {}),
            **({"trust_coefficient": config.trust_coefficient} if rule == "lars" else {}),
            "learning_rate": rate,
            "weight_decay": decay,
            "learning_rates": config.rates(),
            "weight_decays": config.weight_decays,
            **chosen,
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "trained_on": len(train.labels),
        }


class _Augmented:
    """Features of augmented images of the labelled rows of a split, computed for every batch."""

    def __init__(self, encoder: FrozenEncoder, dataset: ImageDataset, config: LinearProbeConfig) -> None:
        self._encoder, self._dataset, self._seed = encoder, dataset, config.seed
        self._labelled = [row for row in range(len(dataset)) if dataset.label(row) >= 0]
        self._augment = Augment(config.augmentation, dataset.image_size)

    def batch(self, rows: Rows, epoch: int, number: int) -> torch.Tensor:
        """Returns features [len(rows), D] of rows of the labelled images."""
        draws = stream("linear_probe augment", self._seed, epoch, number)
        labelled = [self._labelled[row] for row in rows]
        return self._encoder.encode(augmented(self._dataset, labelled, self._augment, draws, self._encoder.device))
