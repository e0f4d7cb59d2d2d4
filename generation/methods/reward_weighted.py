"""Reward-weighted likelihood (arXiv 2302.12192): scored single images, and pre-training images to stay faithful."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import InputError

from ..data import CheckedData
from ..objectives import reward_weighted_loss
from ..training.configuration import Place, TrainingConfig, setting, settings
from ..training.denoiser import Batch
from ..training.denoising import DenoisingTrainer
from ..training.preparation import Encoders
from ..training.trainer import Trainer
from ..training.training_set import EncodedSet

__all__ = ["RewardWeightedConfig", "RewardWeightedTrainer", "ScoredBatch"]


@settings
class RewardWeightedConfig(TrainingConfig):
    """Settings of `RewardWeightedTrainer`.

    Data are captioned images with a `reward` in [0, 1], or preference pairs, whose winners count 1 and losers 0 unless
    they have rewards. The paper's beta is not known.
    """

    method: ClassVar[str] = "rwl"
    summary: ClassVar[str] = "Reward-weighted likelihood: scored images (arXiv 2302.12192)."
    data_kinds: ClassVar[str] = """captioned images with a column `reward` in [0, 1]: Parquet (image,
caption, reward) or a folder with metadata.jsonl (file_name, caption, reward);
rows without a reward are left out. Or pairs, as for the other methods: winners
count 1 and losers 0, or their reward_0 and reward_1."""
    example: ClassVar[str] = "DATA OUTPUT --pretraining-data IMAGES"

    beta: float = setting(1.0, "Weight of the pre-training images' denoising; 0 needs none.", ge=0)
    pretraining_data: Place | None = setting(None, "Captioned images like those the model was trained on.")
    pretraining_split: str | None = setting(
        None, "Split of pretraining_data, if that is a datasets: set. (default: train)", fixed=False
    )


@dataclass(frozen=True)
class ScoredBatch:
    """Scored images, and pre-training images beside them."""

    scored: Batch
    pretraining: Batch | None = None

    def to(self, device: torch.device) -> ScoredBatch:
        """All of it on a device."""
        return ScoredBatch(self.scored.to(device), self.pretraining and self.pretraining.to(device))

    def labels(self) -> dict[str, list[str]]:
        """What an error calls each row; values that end in _pretrain are of the pre-training images."""
        other = {"_pretrain": self.pretraining.labels()[""]} if self.pretraining else {}
        return self.scored.labels() | other


class _ScoredSet:
    """A batch of pre-training images beside every batch of scored ones; the probe is of scored ones alone."""

    def __init__(self, scored: EncodedSet, pretraining: EncodedSet | None) -> None:
        self._scored, self._pretraining = scored, pretraining
        self.fingerprint = scored.fingerprint + (pretraining.fingerprint if pretraining else "")
        self.threaded = scored.threaded

    def batch(self, number: int) -> ScoredBatch:
        other = self._pretraining
        return ScoredBatch(self._scored.batch(number), other.batch(number) if other else None)

    def probe(self, size: int) -> Iterator[ScoredBatch]:
        return map(ScoredBatch, self._scored.probe(size))


class RewardWeightedTrainer(DenoisingTrainer):
    """Denoises scored images in proportion to their reward, and as many pre-training images beside them."""

    config_class = RewardWeightedConfig
    config: RewardWeightedConfig
    unit = "images"
    scored = True
    shown: ClassVar[Mapping[str, tuple[str, str]]] = Trainer.shown

    def loss(self, batch: ScoredBatch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """`reward_weighted_loss`; values of each scored image."""
        scored, other = batch.scored, batch.pretraining
        assert scored.rewards is not None
        terms = reward_weighted_loss(
            self.denoiser.predict(scored),
            self.denoiser.target(scored),
            scored.rewards,
            None if other is None else self.denoiser.predict(other),
            None if other is None else self.denoiser.target(other),
            beta=self.config.beta,
        )
        values = {"mse": terms.mse.detach(), "reward": scored.rewards}
        if terms.mse_pretrain is not None:
            values["mse_pretrain"] = terms.mse_pretrain.detach()
        return terms.loss, values

    def check_settings(self) -> None:
        """Refuse beta above 0 without pre-training data, and such data that would not be used."""
        super().check_settings()
        given = self.config.pretraining_data is not None
        if self.config.beta > 0 and not given:
            raise InputError(
                "beta is above 0 but no pretraining_data (--pretraining-data) is given; give some, or set beta to 0"
            )
        if self.config.pretraining_split is not None and not given:
            raise InputError("pretraining_split is given without pretraining_data; give both, or neither")

    def check_rows(self) -> list[CheckedData]:
        """The scored images, and the pre-training images under their own split, and without a margin."""
        (scored,) = super().check_rows()
        for example in scored.examples:
            for reward in example.rewards or ():
                if not 0 <= reward <= 1:
                    raise InputError(f"{example.name} has the reward {reward:g}; rewards must be in [0, 1]")
        config = self.config
        if not config.beta or config.pretraining_data is None:
            return [scored]
        filtered = self._filter if config.min_score is not None else None
        chosen = {"split": config.pretraining_split, "reward": filtered}
        other = self._checked(config.pretraining_data, "winners", "left_out_pretraining_rows", **chosen)
        return [scored, other]

    def encode_rows(self, checked: list[CheckedData], encoders: Encoders) -> _ScoredSet:
        """Both sets, the second with noise and order of its own."""
        seed = self.config.seed
        scored = self._encoded(checked[0], self.unit, encoders, seed=seed)
        if len(checked) == 1:
            return _ScoredSet(scored, None)
        return _ScoredSet(scored, self._encoded(checked[1], "winners", encoders, seed=(seed + 1_000_003) % 2**63))
