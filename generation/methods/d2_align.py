"""D2-Align (arXiv 2512.24146): a direction learnt from the frozen generator's images, then Direct-Align on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import InputError
from mmalign.progress import progress_bar

from ..rewards import DirectionalReward, EmbeddingReward, RewardDirection, fit_reward_direction
from ..training.cache import TensorStore, content_key
from ..training.configuration import Place, inherited, setting, settings, to_dict
from ..training.preparation import cache_folder
from ..training.trainer import Prepared
from .reward_gradient import DirectAlignConfig, RewardGradientTrainer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["D2AlignConfig", "D2AlignTrainer"]

# Settings that change what the model draws.
_CHANGES_IMAGES = (
    *("seed", "sampling_steps", "guidance", "sampler", "eta", "resolution"),
    *("vae", "vae_dtype", "dtype", "cache_dtype"),
)


@settings
class D2AlignConfig(DirectAlignConfig):
    """Settings of `D2AlignTrainer`.

    The paper trains all weights of FLUX.1-dev at learning rate 5e-6 for 20 steps, after 3,000 steps of stage 1; the
    learning rate here is for a LoRA, and ours. It says neither from where the direction starts (zero here), nor
    whether texts are normalised before it is added, nor whether the guided text is after (both here).
    """

    method: ClassVar[str] = "d2-align"
    summary: ClassVar[str] = "D2-Align: Direct-Align with a learnt direction against collapse (arXiv 2512.24146)."

    omega: float = setting(1.5, "Guidance scale of the direction.", gt=0)
    direction: Place | None = setting(None, "A direction learnt before, instead of learning it (stage 1).")
    direction_images: int = setting(512, "Images of the model as it is that the direction is learnt from.", ge=2)
    direction_steps: int = setting(3000, "Steps of stage 1; on stored vectors, seconds.", ge=1)
    direction_lr: float = setting(5e-6, "Learning rate of stage 1: steps * lr * sqrt(dim) bounds its length.", gt=0)
    direction_max_norm: float | None = setting(None, "Keep the direction at most this long.", gt=0)
    normalize_text: bool = setting(True, "Texts have length 1 before the direction is added.")
    renormalize: bool = setting(True, "The guided text is brought back to length 1.")
    guidance: float = inherited(DirectAlignConfig, "guidance", 1.0)
    learning_rate: float = inherited(DirectAlignConfig, "learning_rate", 1e-4)
    weight_decay: float = inherited(DirectAlignConfig, "weight_decay", 1e-4)
    max_grad_norm: float = inherited(DirectAlignConfig, "max_grad_norm", 0.1)
    accumulation: int = inherited(DirectAlignConfig, "accumulation", 2)

    def in_small(self) -> dict[str, Any]:
        """A few images, and a few steps."""
        return {
            **super().in_small(),
            "reward": ["cosine:bundled"],
            "direction": None,
            "direction_images": min(self.direction_images, 8),
            "direction_steps": min(self.direction_steps, 20),
        }


class D2AlignTrainer(RewardGradientTrainer):
    """Stage 1 where no direction is given, then reward gradients as the config says.

    `direction.safetensors` and `direction.png` in the run folder are what stage 1 came to. In the log, `reward` is the
    corrected one and `probe_uncorrected` the same without the direction.
    """

    config_class = D2AlignConfig
    config: D2AlignConfig

    def prepare(self) -> Prepared:
        """As every trainer on rewards; the reward has to see image and prompt as two vectors."""
        prepared = super().prepare()
        if not isinstance(self.reward, EmbeddingReward) or not self.reward.uses_text:
            raise InputError(
                f"d2-align needs a reward that sees image and prompt as two vectors, and {self.reward.name!r} does "
                "not; give one of cosine, clipscore, pickscore, hps-v2, hps-v2.1"
            )
        self.watched = {"uncorrected": self.reward}
        return prepared

    def connect(self, pipeline: DiffusionPipeline) -> None:
        """Stage 1, while the adapters do nothing yet; later runs in this folder read what it came to."""
        super().connect(pipeline)
        assert isinstance(self.reward, EmbeddingReward)
        self.reward = DirectionalReward(self.reward, self._direction(self.reward))

    def _direction(self, reward: EmbeddingReward) -> RewardDirection:
        config, main = self.config, self.accelerator.is_main_process
        if config.direction is not None:
            return RewardDirection.load(config.direction)
        file = self.folder.path / "direction.safetensors"
        if not file.is_file():
            images, texts = self._vectors(reward)
            self.accelerator.wait_for_everyone()
            if main:
                fitted = fit_reward_direction(
                    images,
                    texts,
                    omega=config.omega,
                    steps=config.direction_steps,
                    lr=config.direction_lr,
                    max_norm=config.direction_max_norm,
                    normalize_text=config.normalize_text,
                    renormalize=config.renormalize,
                    seed=config.seed,
                    progress=config.progress,
                    reward=reward,
                )
                fitted.draw(self.folder.path / "direction.png")
                fitted.save(file)
        self.accelerator.wait_for_everyone()
        direction = RewardDirection.load(file)
        if direction.gap_without <= 0:
            self.warn(
                "the reward does not tell matched from mismatched prompts of the model's images (gap "
                f"{direction.gap_without:.3g}), so a direction has nothing to keep; train with a reward that does"
            )
        elif direction.gap < 0.5 * direction.gap_without:
            self.warn(
                f"the direction ({direction.norm:.2f} long) leaves {direction.gap:.3g} of the gap of "
                f"{direction.gap_without:.3g} between matched and mismatched prompts: the reward forgets the prompt; "
                "set direction_max_norm, or fewer direction_steps"
            )
        return direction

    def _vectors(self, reward: EmbeddingReward) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
        """Of images of the model as it is and their prompts; cached, each under all that made it."""
        config, prompts = self.config, self.prompts.prompts
        store = TensorStore(cache_folder(config) / "reward-vectors") if config.cache else None
        about = {
            "model": self._weights,
            "reward": reward.encoder.fingerprint,
            "preprocessing": str(reward.preprocessing),
            **{name: to_dict(config)[name] for name in _CHANGES_IMAGES},
        }
        rows: list[Tensor] = []
        with progress_bar(
            "drawing for the direction",
            config.direction_images,
            enabled=config.progress and self.accelerator.is_main_process,
        ) as advance:
            for start in range(0, config.direction_images, config.batch_size):
                numbers = range(start, min(start + config.batch_size, config.direction_images))
                batch = [prompts[number % len(prompts)] for number in numbers]
                key = content_key(**about, prompts=batch, first=start)
                if store is not None and key in store:
                    rows.append(store.read(key)["vectors"])
                else:
                    vectors = self._drawn(reward, batch, numbers)
                    if store is not None:
                        store.write(key, {"vectors": vectors}, torch.float32, f"image {start}")
                    rows.append(vectors)
                advance(len(batch))
        texts = [prompts[number % len(prompts)] for number in range(config.direction_images)]
        return torch.cat(rows), torch.cat([reward.text_embeds([text]) for text in texts]).cpu()

    def _drawn(self, reward: EmbeddingReward, prompts: Sequence[str], numbers: range) -> Float[Tensor, "n dim"]:
        images = list(self.draw(prompts, [("direction", number) for number in numbers]))
        with torch.no_grad():
            return reward.image_embeds(images).float().cpu()
