"""D2-Align (arXiv 2512.24146): a direction learnt from the frozen generator's images, then Direct-Align on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import InputError
from mmalign.files import whole_file
from mmalign.progress import progress_bar

from ..rewards import DirectionalReward, EmbeddingReward, RewardDirection, fit_reward_direction
from ..training.cache import TensorStore, content_key
from ..training.configuration import Place, inherited, setting, settings, to_dict
from ..training.encoding import LatentEncoder
from ..training.preparation import cache_folder
from ..training.trainer import Prepared
from .reward_gradient import DirectAlignConfig, RewardGradientTrainer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["D2AlignConfig", "D2AlignTrainer"]

# Settings of learning a direction.
_OF_STAGE_1 = (
    *("omega", "normalize_text", "renormalize"),
    *("direction_images", "direction_steps", "direction_lr", "direction_max_norm"),
)
# Settings that change what the model draws, and in which batches.
_CHANGES_IMAGES = (
    *("seed", "sampling_steps", "guidance", "sampler", "eta", "resolution"),
    *("vae_dtype", "dtype", "cache_dtype", "batch_size"),
)


@settings
class D2AlignConfig(DirectAlignConfig):
    """Settings of `D2AlignTrainer`.

    The paper trains all weights of FLUX.1-dev at learning rate 5e-6 for 20 steps, one image a GPU, after 3,000 steps of
    stage 1, whose images are Direct-Align reconstructions drawn anew at each step. Learning rate and batch here are for
    a LoRA, and ours; stage 1 takes stored samples. The paper says neither from where the direction starts (zero here),
    nor whether texts are normalised before it is added, nor whether the guided text is after (both here).
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
    steps: int = inherited(DirectAlignConfig, "steps", 20)
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

    `direction.safetensors`, `.json` and `.png` in the run folder are what stage 1 came to. In the log, `reward` is the
    corrected one and `probe_uncorrected` the same without the direction.
    """

    config_class = D2AlignConfig
    config: D2AlignConfig

    def check_settings(self) -> None:
        """Refuse what stage 1 cannot learn from, and settings of a stage 1 that will not be."""
        super().check_settings()
        config, default = self.config, type(self.config)()
        if config.omega == 0.5:
            raise InputError("omega 0.5 gives the direction no gradient (R(b) = R(-b)); 1.5 is the paper's")
        if config.direction is not None:
            self._read = RewardDirection.load(config.direction)
            own = [name for name in _OF_STAGE_1 if getattr(config, name) != getattr(default, name)]
            if own:
                raise InputError(f"{own[0]} is of learning a direction, and one is given; leave one of them out")

    def check_reward(self) -> None:
        """It has to have a gradient, and to see image and prompt as two vectors."""
        super().check_reward()
        if not isinstance(self.reward, EmbeddingReward) or not self.reward.uses_text:
            raise InputError(
                f"d2-align needs a reward that sees image and prompt as two vectors, and {self.reward.name!r} does "
                "not; give one of cosine, clipscore, pickscore, hps-v2, hps-v2.1"
            )
        if self.config.direction is not None:
            DirectionalReward(self.reward, self._read)
        self.watched = {"uncorrected": self.reward}

    def prepare(self) -> Prepared:
        """As every trainer on rewards; a direction is learnt from two prompts at least."""
        prepared = super().prepare()
        if self.config.direction is None and len(self.prompts.prompts) < 2:
            raise InputError(f"a direction is learnt from several prompts and {self.config.data!r} has one; add some")
        return prepared

    def connect(self, pipeline: DiffusionPipeline) -> None:
        """Stage 1, while the adapters do nothing yet; later runs in this folder read what it came to."""
        super().connect(pipeline)
        assert isinstance(self.reward, EmbeddingReward)
        self.reward = DirectionalReward(self.reward, self._direction(self.reward))

    def _direction(self, reward: EmbeddingReward) -> RewardDirection:
        config, main = self.config, self.accelerator.is_main_process
        if config.direction is not None:
            return self._read
        file, note = (self.folder.path / f"direction.{suffix}" for suffix in ("safetensors", "json"))
        about = self._about(reward)
        made_of = content_key(**about, **{name: to_dict(config)[name] for name in _OF_STAGE_1})
        if not (file.is_file() and _noted(note) == made_of):
            images, texts = self._vectors(reward, about)
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
                with whole_file(note) as fresh:
                    fresh.write_text(json.dumps({"made_of": made_of, **fitted.to_dict()}, indent=1), encoding="utf-8")
            self.accelerator.wait_for_everyone()
        direction = RewardDirection.load(file)
        if config.dry_run:
            return direction  # what random images say of it means nothing
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

    def _about(self, reward: EmbeddingReward) -> dict[str, object]:
        """All that makes the images of stage 1 and their vectors."""
        vae = LatentEncoder(self.sampler.vae, self.accelerator.device)
        scheduler = {name: str(value) for name, value in self.sampler.scheduler.config.items()}
        return {
            "model": self._weights,
            "vae": vae.fingerprint,
            "prompts": self.prompts.fingerprint,  # with the text encoders
            "scheduler": [type(self.sampler.scheduler).__name__, sorted(scheduler.items())],
            "reward": reward.encoder.fingerprint,
            "preprocessing": str(reward.preprocessing),
            **{name: to_dict(self.config)[name] for name in _CHANGES_IMAGES},
        }

    def _vectors(
        self, reward: EmbeddingReward, about: Mapping[str, object]
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
        """Of images of the model as it is and their prompts; cached batch by batch, each under all that made it.

        Several processes that share a cache draw in turns; without one each draws them all.
        """
        config, accelerator, prompts = self.config, self.accelerator, self.prompts.prompts
        store = TensorStore(cache_folder(config) / "reward-vectors") if config.cache else None
        count, size = config.direction_images, config.batch_size
        rows: dict[int, Tensor] = {}
        with progress_bar(
            "drawing for the direction", count, enabled=config.progress and accelerator.is_main_process
        ) as advance:
            for turn, start in enumerate(range(0, count, size)):
                numbers = range(start, min(start + size, count))
                key = content_key(**about, first=start, count=len(numbers))
                if store is None or key not in store:
                    if store is not None and turn % accelerator.num_processes != accelerator.process_index:
                        continue
                    rows[start] = self._drawn(reward, [prompts[n % len(prompts)] for n in numbers], numbers)
                    if store is not None:
                        store.write(key, {"vectors": rows[start]}, torch.float32, f"image {start}")
                advance(len(numbers))
        accelerator.wait_for_everyone()
        for start in range(0, count, size):
            if store is not None and start not in rows:
                key = content_key(**about, first=start, count=min(size, count - start))
                rows[start] = store.read(key)["vectors"]
        texts = [reward.text_embeds([prompts[number % len(prompts)]]) for number in range(count)]
        return torch.cat([rows[start] for start in sorted(rows)]), torch.cat(texts).cpu()

    def _drawn(self, reward: EmbeddingReward, prompts: Sequence[str], numbers: range) -> Float[Tensor, "n dim"]:
        images = list(self.draw(prompts, [("direction", number) for number in numbers]))
        with torch.no_grad():
            return reward.image_embeds(images).float().cpu()


def _noted(file: Path) -> str | None:
    """What the direction beside this file was made of."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
