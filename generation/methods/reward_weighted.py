"""Reward-weighted likelihood (arXiv 2302.12192): scored single images, and pre-training images to stay faithful."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmalign.errors import InputError

from ..objectives import reward_weighted_loss
from ..training.configuration import STRICT, Place, TrainingConfig, setting
from ..training.denoiser import Batch
from ..training.preparation import Prepared, check, encode
from ..training.randomness import BucketedBatches
from ..training.trainer import Trainer
from ..training.training_set import EncodedSet

__all__ = ["RewardWeightedConfig", "RewardWeightedTrainer"]


@dataclass(config=STRICT, kw_only=True)
class RewardWeightedConfig(TrainingConfig):
    """Settings of `RewardWeightedTrainer`.

    Data are captioned images with a `reward` in [0, 1]; of preference pairs, winners count 1 and losers 0. The
    paper's beta is not known.
    """

    method: ClassVar[str] = "rwl"

    beta: float = setting(1.0, "Weight of the pre-training images' denoising; 0 needs none.", ge=0)
    pretraining_data: Place | None = setting(None, "Captioned images like those the model was trained on.")


class RewardWeightedTrainer(Trainer):
    """Denoises scored images in proportion to their reward, and as many pre-training images beside them."""

    config_class = RewardWeightedConfig
    config: RewardWeightedConfig
    unit = "images"
    _pretraining: EncodedSet | None = None

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """`reward_weighted_loss`; values of each scored image."""
        other = batch.pretraining
        assert batch.rewards is not None
        terms = reward_weighted_loss(
            self.denoiser.predict(batch),
            self.denoiser.target(batch),
            batch.rewards,
            None if other is None else self.denoiser.predict(other),
            None if other is None else self.denoiser.target(other),
            beta=self.config.beta,
        )
        values = {"mse": terms.mse.detach(), "reward": batch.rewards}
        if terms.mse_pretrain is not None:
            values["mse_pretrain"] = terms.mse_pretrain.detach()
        return terms.loss, values

    def prepare(self) -> Prepared:
        """The scored images, and the pre-training images with noise and order of their own.

        Raises:
            InputError: a reward outside [0, 1], or beta above 0 without pre-training data.
        """
        config = self.config
        if config.beta > 0 and config.pretraining_data is None:
            raise InputError("beta is above 0 but no pretraining_data is given; give some, or set beta to 0")
        prepared = super().prepare()
        for sample in prepared.data.samples:
            if not 0 <= sample.reward <= 1:
                raise InputError(f"{sample.name} has the reward {sample.reward:g}; rewards must be in [0, 1]")
        if config.beta > 0 and config.pretraining_data is not None:
            other = replace(config, seed=config.seed + 1_000_003)
            report = "left_out_pretraining_rows.jsonl"
            checked = check(
                other, self.accelerator, config.pretraining_data, "winners", report=report, reward=self._reward
            )
            self._pretraining = encode(other, self.accelerator, checked, "winners", prepared.encoders)
            if config.cache:
                prepared.encoders.release()
            sizes = [sample.placement.target for sample in self._pretraining.samples]
            self._order = BucketedBatches(sizes, config.batch_size, other.seed)
            prepared.fingerprint += checked.fingerprint
        return prepared

    def assemble(self, data: EncodedSet, indices: Sequence[int], ordinals: Sequence[int]) -> Batch:
        """A batch of scored images with one of pre-training images beside it."""
        batch = data.batch(indices, ordinals)
        if self._pretraining is None:
            return batch
        chosen = self._order[ordinals[0] // self.config.batch_size]
        return replace(batch, pretraining=self._pretraining.batch(chosen, ordinals))
