"""Training a generator on what it draws itself: prompts in, rewards out, and a look at what is lost meanwhile.

What every such method has in common: prompts with their embeddings, rewards that are trained on and rewards that are
not, and a probe, the same images of held-out prompts drawn again and again, scored by all rewards and measured for
diversity.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.encoders import load_encoder
from mmalign.errors import InputError
from mmalign.imaging.contact_sheet import draw_contact_sheet
from mmalign.metrics import HIGHER_IS_MORE_DIVERSE, diversity_values

from ..drawing import sampling_options
from ..latents import decode_latents, to_picture, unit_pixels
from ..noise_levels import ddim_like, refuse_edm
from ..pipelines import pipeline_family, quiet_diffusers
from ..prompts import read_prompts
from ..rewards import EmbeddingReward, Reward, WeightedSum, as_reward, load_rewards
from .configuration import Place, RunConfig, Texts, inherited, setting, settings
from .encoding import LatentEncoder, PromptEncoder
from .preparation import cache_folder
from .presets import REWARD_PRESETS, Preset
from .prompt_set import PromptSet
from .randomness import stream
from .sampler import bare_pipeline, embedded
from .trainer import Prepared, Trainer
from .validation import Validation

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..rewards import AnyReward

__all__ = ["RewardConfig", "RewardTrainer"]

# What the probe logs under names of its own.
_LOGGED = frozenset({"reward", "held_out", "uncorrected", *HIGHER_IS_MORE_DIVERSE})


@settings
class RewardConfig(RunConfig):
    """What every trainer on rewards needs; a method's own config derives from this and adds its switches."""

    presets: ClassVar[Mapping[str, Preset]] = REWARD_PRESETS
    data_kinds: ClassVar[str] = """prompts, one a line, or JSON lines with `prompt` or `caption`."""
    explanation: ClassVar[str] = """--reward and --held-out-reward take what `mmalign score --list` lists. Watch
the probe: images of held-out prompts, drawn again from the same noise. A run
that raises its reward while held-out rewards or diversity fall says so."""
    example: ClassVar[str] = "PROMPTS OUTPUT --reward hps-v2.1"

    reward: Texts = setting([], "What to raise, as SPEC or SPEC=WEIGHT; may repeat, for a weighted sum.")
    held_out_reward: Texts = setting(
        ["clipscore"], "A reward that is measured and not trained on; may repeat. Offline: cosine:bundled."
    )
    held_out_prompts: Place | None = setting(
        None, "Prompts of the probe. (default: a tenth of the prompts, probe_size at most, are kept from training)"
    )
    probe_images: int = setting(4, "Images of each probe prompt; diversity needs 2.", ge=1)
    diversity_encoder: str | None = setting(
        None, "Image encoder that diversity is measured with. (default: that of a reward, a held-out one first)"
    )
    patience: int | None = setting(
        None,
        "End after so many looks at the probe without a better held-out reward (the first one given); the best adapter "
        "is then in OUTPUT/best.",
        fixed=False,
        ge=1,
    )
    sampling_steps: int = setting(50, "Denoising steps of an image, in training and in the probe.", ge=1)
    guidance: float = setting(7.5, "Guidance scale of the same.", ge=0)
    sampler: Literal["ddim", "own"] = setting("ddim", "DDIM, or the pipeline's own; flow models have their own.")
    eta: float = setting(0.0, "Noise added at each DDIM step; 1 is ancestral sampling.", ge=0, le=1)
    vae_dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Precision of the VAE's decoder.")
    probe_size: int = inherited(RunConfig, "probe_size", 8)

    def in_small(self) -> dict[str, Any]:
        """Rewards without weights, few steps and images."""
        return {
            "reward": ["redness"],
            "held_out_reward": ["jpeg-incompressibility"],
            "diversity_encoder": None,
            "sampling_steps": min(self.sampling_steps, 4),
            "probe_images": min(self.probe_images, 2),
        }


class RewardTrainer(Trainer):
    """Trains on rewards of what the pipeline draws.

    Attributes:
        reward: what is raised.
        held_out: by name, what is measured beside it and judged by.
        watched: by name, what else is measured.
        prompts: the training prompts.
        probe_prompts: those of the probe.
        sampler: the pipeline that draws, with the trained network.
    """

    config_class: ClassVar[type[RunConfig]] = RewardConfig
    config: RewardConfig
    through_pipeline = True
    shown: ClassVar[Mapping[str, tuple[str, str]]] = {
        "reward": ("reward", "{:.4f}"),
        "held out": ("probe_held_out", "{:.4f}"),
        "memory": ("peak_memory_gb", "{:.1f} GB"),
    }
    reward: Reward
    held_out: dict[str, Reward]
    probe_prompts: list[str]
    prompts: PromptSet
    sampler: DiffusionPipeline

    def __init__(
        self,
        config: RewardConfig,
        *,
        pipeline: DiffusionPipeline | None = None,
        reward: AnyReward | None = None,
        held_out: Mapping[str, AnyReward] | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            config: all settings.
            pipeline: trained in place of `config.model`; its denoiser is changed, its VAE frozen and moved.
            reward: raised in place of `config.reward`: any reward, or a callable of images and prompts.
            held_out: by name, measured in place of `config.held_out_reward`.
        """
        super().__init__(config, pipeline=pipeline)
        self._given, self._given_held_out = reward, held_out
        self.watched: dict[str, Reward] = {}

    def check_settings(self) -> None:
        """Refuse a run without prompts or without a reward."""
        super().check_settings()
        config = self.config
        if not config.data:
            raise InputError("no prompts given; set data to a file of prompts, one a line")
        judges = config.held_out_reward if self._given_held_out is None else self._given_held_out
        if config.patience is not None and not (config.probe_size and judges):
            raise InputError("patience goes by a held-out reward in the probe; give one, and a probe_size above 0")
        if self._given is None and not self.config.reward:
            raise InputError("no reward given; set reward (--reward), such as hps-v2.1, or cosine:bundled offline")

    def prepare(self) -> Prepared:
        """Prompts first, as that is cheap and fails early; then rewards, the model, and embeddings."""
        config, device = self.config, self.accelerator.device
        prompts, self.probe_prompts = self._split_prompts()
        self.reward = as_reward(self._given) if self._given is not None else self._loaded(config.reward)
        self.check_reward()
        self.held_out = self._load_held_out()
        self._diversity_encoder = None
        if config.diversity_encoder is not None:
            self._diversity_encoder = load_encoder(config.diversity_encoder, device=device)
        pipeline = self.load_pipeline()
        self._tell_of_long_prompts(pipeline, [*prompts, *self.probe_prompts])
        encoder = PromptEncoder(pipeline, device)
        self.prompts = PromptSet(
            prompts,
            encoder,
            batch_size=config.batch_size,
            seed=config.seed,
            store=cache_folder(config) if config.cache else None,
            dtype=getattr(torch, config.cache_dtype),
        )
        main = self.accelerator.is_main_process
        self.prompts.encode_all(
            self.probe_prompts,
            progress=config.progress and main,
            part=(self.accelerator.process_index, self.accelerator.num_processes),
        )
        self.accelerator.wait_for_everyone()
        validation = None
        if config.validation_prompts:
            latents = LatentEncoder(pipeline.vae, device)
            validation = Validation(pipeline, encoder, latents, config, release=False)
        if config.cache:
            encoder.release()
        held_out = tuple(f"probe_{name}" for name in self.held_out)
        self.panels = {
            "reward": ("reward", "probe_reward"),
            "held-out rewards (probe)": held_out,
            "similarity within prompts (probe)": ("probe_within_prompt_similarity",),
            "tonal variation (probe)": ("probe_tonal_variation",),
            "gradient norm": ("grad_norm",),
        }
        return Prepared(pipeline, self.prompts, validation)

    @property
    def probe_steps(self) -> int | None:
        """Denoising steps of the probe's images, where other than in training."""
        return None

    def check_reward(self) -> None:
        """Refuse a reward that this method cannot raise, before the model is loaded."""

    def connect(self, pipeline: DiffusionPipeline) -> None:
        """Make the pipeline that draws: its network is the trained one, its text encoders stay away.

        Raises:
            InputError: the pipeline cannot draw at this resolution, or with this sampler.
        """
        config, device = self.config, self.accelerator.device
        sampling_options(pipeline, height=config.resolution, width=config.resolution)
        refuse_edm(pipeline.scheduler.config)
        if config.sampler == "own" and "PNDM" in type(pipeline.scheduler).__name__:
            raise InputError("the pipeline's own sampler, PNDM, goes to a timestep twice; set sampler to ddim")
        diffusion = pipeline_family(pipeline) in ("sdxl", "sd15")
        scheduler = ddim_like(pipeline.scheduler) if diffusion and config.sampler == "ddim" else None
        if config.eta and (not diffusion or config.sampler != "ddim"):
            raise InputError(f"eta {config.eta:g} is of DDIM, which this run does not sample with; set eta to 0")
        with quiet_diffusers():
            pipeline.vae.requires_grad_(False).to(device, getattr(torch, config.vae_dtype))
        # Once the denoiser is checkpointed, decoding is what takes most: 11 GB at 1024 px without this.
        if getattr(pipeline.vae, "_supports_gradient_checkpointing", False):
            pipeline.vae.enable_gradient_checkpointing()
        self.sampler = bare_pipeline(pipeline, vae=True, scheduler=scheduler)
        self._unconditional = None if pipeline_family(pipeline) == "flux" else self.prompts.embedding(None)

    def call(
        self,
        embeddings: Sequence[Mapping[str, Tensor]],
        generators: Sequence[torch.Generator],
        *,
        steps: int | None = None,
    ) -> dict[str, Any]:
        """The sampler's arguments for a batch; `steps` other than those of training."""
        config = self.config
        dtype = next(p.dtype for p in self.learner.adaptation.network.parameters() if p.is_floating_point())
        if config.adaptation == "full":
            dtype = torch.float32  # autocast takes it from there
        more = {"eta": config.eta} if config.eta else {}
        return {
            **embedded(self.sampler, embeddings, self._unconditional, self.accelerator.device, dtype),
            "num_inference_steps": steps or config.sampling_steps,
            "guidance_scale": config.guidance,
            "height": config.resolution,
            "width": config.resolution,
            "generator": list(generators),
            **more,
        }

    def decode(self, latents: Float[Tensor, "n ..."]) -> tuple[Float[Tensor, "n 3 height width"], Float[Tensor, " n"]]:
        """Images in [0, 1] with gradient, and the share of each that the clamp stops the gradient of."""
        side = self.config.resolution
        decoded = decode_latents(self.sampler, latents, height=side, width=side)
        saturated = (decoded.detach().abs() >= 1).float().flatten(1).mean(dim=1)
        return unit_pixels(decoded), saturated

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[tuple[Any, ...]]) -> Iterator[Float[Tensor, "3 h w"]]:
        """Images in [0, 1], on the CPU, a batch at a time; each seed names the noise of an image (see `stream`)."""
        steps = self.probe_steps
        size = self.config.batch_size
        for start in range(0, len(prompts), size):
            embeddings = [self.prompts.embedding(prompt) for prompt in prompts[start : start + size]]
            generators = [stream(self.config.seed, *seed) for seed in seeds[start : start + size]]
            latents = self.sampler(
                **self.call(embeddings, generators, steps=steps), output_type="latent", return_dict=False
            )[0]
            yield from self.decode(latents)[0].cpu()

    def look(self) -> dict[str, float]:
        """The probe: rewards trained on and held out, and diversity; its pictures in samples/probe-*.png."""
        config = self.config
        if not self.probe_prompts:
            return {}
        prompts = [prompt for prompt in self.probe_prompts for _ in range(config.probe_images)]
        places = [(p, i) for p in range(len(self.probe_prompts)) for i in range(config.probe_images)]
        with self.learner.averaged():
            images = list(self.draw(prompts, [("probe", *place) for place in places]))
        scores = {"reward": self.reward(images, prompts)}
        others = {**self.held_out, **self.watched}
        scores |= {name: reward(images, prompts) for name, reward in others.items()}
        values = {f"probe_{name}": float(of.mean()) for name, of in scores.items()}
        values |= {f"probe_{name}_std": float(of.std()) for name, of in scores.items()}
        if self.held_out:
            values["probe_held_out"] = values[f"probe_{next(iter(self.held_out))}"]
            self._keep_best(values["probe_held_out"])
        embeds = self._embeds(images)
        if len(images) > 1:
            diversity = diversity_values(images, embeds, [place[0] for place in places])
            values |= {f"probe_{name}": value for name, value in diversity.items()}
        if self.accelerator.is_main_process:
            self._draw_probe(images, scores)
        return values

    def judge(self, start: Mapping[str, float], values: Mapping[str, float]) -> dict[str, str]:
        """Warn of a reward that rises while others or diversity fall (see `over_optimisation_warnings`)."""
        if len(self.probe_prompts) * self.config.probe_images < 4:
            return {}  # too few to tell a change from chance
        return over_optimisation_warnings(start, values, list(self.held_out))

    def facts(self) -> dict[str, str]:
        """Rewards by their fingerprints, and the prompts of the probe."""
        held_out = ", ".join(f"{name}: {reward.fingerprint}" for name, reward in self.held_out.items())
        return {
            "reward": str(self.reward.fingerprint),
            "held-out reward": held_out,
            "probe's prompts": hashlib.sha256("\n".join(self.probe_prompts).encode()).hexdigest()[:16],
        }

    def enough(self) -> str | None:
        """Why to end before the last step: no better held-out reward for `patience` looks."""
        patience = self.config.patience
        if patience is None or not self.held_out:
            return None
        looks = self._looks()
        best = max(range(len(looks)), key=lambda i: looks[i][1], default=0)
        if len(looks) - 1 - best < patience:
            return None
        return (
            f"the held-out reward {next(iter(self.held_out))} was best at step {looks[best][0]} "
            f"({looks[best][1]:.4g}) and not better in {len(looks) - 1 - best} looks since; the adapter of that step "
            f"is in {self.folder.path / 'best'}. Raise patience to go on"
        )

    def _looks(self) -> list[tuple[int, float]]:
        """Step and held-out reward of every look so far; what is no number counts as the worst."""
        rows = self.folder.logged("probe_held_out")
        found = [(row["step"], row["probe_held_out"]) for row in rows]
        return [(step, value if math.isfinite(value) else -math.inf) for step, value in found]

    def _keep_best(self, held_out: float) -> None:
        """Export to OUTPUT/best what is better than at all looks before; for runs that may end by it."""
        better = all(value < held_out for _, value in self._looks())
        if self.config.patience is not None and better and self.accelerator.is_main_process:
            self.learner.export(self.folder.path / "best", {"mmalign_steps": str(self.step)})

    def _split_prompts(self) -> tuple[list[str], list[str]]:
        """Training prompts and those of the probe, without repetitions."""
        config = self.config
        prompts = list(dict.fromkeys(read_prompts(config.data)))
        if config.held_out_prompts is not None:
            held_out = list(dict.fromkeys(read_prompts(config.held_out_prompts)))
            if not held_out:
                raise InputError(f"held_out_prompts {config.held_out_prompts!r} holds no prompt; add some, one a line")
            prompts = [prompt for prompt in prompts if prompt not in set(held_out)]
        else:
            order = torch.randperm(len(prompts), generator=stream(config.seed, "held-out prompts")).tolist()
            count = min(config.probe_size, max(len(prompts) // 10, 1)) if len(prompts) > 1 else 0
            held_out = [prompts[i] for i in order[:count]]
            prompts = [prompts[i] for i in sorted(order[count:])]
        if not prompts:
            raise InputError(f"{config.data!r} holds no prompt to train on (beside those held out); add some")
        return prompts, held_out[: config.probe_size]

    def _loaded(self, specs: str | Sequence[str]) -> Reward:
        device = self.accelerator.device
        # On a CPU "auto" takes the precision that a timed pass finds faster: not always the same.
        return load_rewards(specs, device=device, dtype="auto" if device.type == "cuda" else "float32")

    def _load_held_out(self) -> dict[str, Reward]:
        if self._given_held_out is not None:
            if taken := sorted(_LOGGED & set(self._given_held_out)):
                raise InputError(
                    f"a held-out reward is named {taken[0]!r}, which the log has another use for; rename it"
                )
            return {name: as_reward(reward) for name, reward in self._given_held_out.items()}
        found: dict[str, Reward] = {}
        for spec in self.config.held_out_reward:
            reward = self._loaded(spec)
            found[reward.name if reward.name not in {*found, *_LOGGED} else spec] = reward
        terms = [reward for _, reward in self.reward.terms.values()] if isinstance(self.reward, WeightedSum) else []
        trained = {reward.fingerprint for reward in (self.reward, *terms)} - {None}
        if any(reward.fingerprint in trained for reward in found.values()):
            raise InputError("a held-out reward is the one that is trained on; give another (--held-out-reward)")
        return found

    def _tell_of_long_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> None:
        """Warn of what the text encoder will not see; SD3 and FLUX have a second, longer one."""
        if pipeline_family(pipeline) not in ("sdxl", "sd15"):
            return
        most = pipeline.tokenizer.model_max_length
        with quiet_diffusers():
            long = [prompt for prompt in prompts if len(pipeline.tokenizer(prompt).input_ids) > most]
        if long:
            self.warn(
                f"{len(long)} prompts have more than {most} tokens and are cut there, such as {long[0][:60]!r}..."
            )

    def _embeds(self, images: Sequence[Float[Tensor, "3 h w"]]) -> Float[np.ndarray, "n dim"] | None:
        """Vectors that diversity is measured with, or `None` where no encoder is at hand."""
        if self._diversity_encoder is not None:
            return self._diversity_encoder.encode_images(images)
        for reward in (*self.held_out.values(), self.reward):
            if isinstance(reward, EmbeddingReward):
                return np.concatenate([reward.image_embeds([image]).detach().cpu().numpy() for image in images])
        return None

    def _draw_probe(self, images: Sequence[Float[Tensor, "3 h w"]], scores: Mapping[str, np.ndarray]) -> None:
        count = self.config.probe_images
        rows = []
        for place, prompt in enumerate(self.probe_prompts):
            numbers = range(place * count, (place + 1) * count)
            cells = [
                (to_picture(images[n]), [f"{name} {of[n]:.3g}" for name, of in list(scores.items())[:3]])
                for n in numbers
            ]
            rows.append((prompt, cells))
        path = self.folder.sample(self.step).with_name(f"probe-{self.step:06d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_contact_sheet(rows, path, cell=min(256, max(128, self.config.resolution)))


def over_optimisation_warnings(
    start: Mapping[str, float], values: Mapping[str, float], held_out: Sequence[str]
) -> dict[str, str]:
    """Why to worry about a run on rewards, by kind, from its first look at the probe and this one.

    A reward that rises while what was not trained falls is being exploited. Proposed thresholds, not published ones:
    the trained reward is half a standard deviation (of images, at the start) above its start, and a held-out one as
    much below; or the spread of images of one prompt (1 - similarity) or their tonal variation is down by a fifth.
    """

    def rise(name: str) -> float:
        spread = start.get(f"{name}_std", 0.0)
        known = name in start and name in values and spread > 0
        return (values[name] - start[name]) / spread if known else 0.0

    if rise("probe_reward") < 0.5:
        return {}
    found = {}
    gained = f"the trained reward rose from {start['probe_reward']:.4g} to {values['probe_reward']:.4g}"
    for name in held_out:
        if rise(f"probe_{name}") < -0.5:
            before, now = start[f"probe_{name}"], values[f"probe_{name}"]
            found[f"held-out {name}"] = (
                f"{gained} while the held-out reward {name} fell from {before:.4g} to {now:.4g}: over-optimisation; an "
                "earlier checkpoint is probably better"
            )
    spreads = {
        "images of one prompt grow alike (similarity": ("probe_within_prompt_similarity", lambda v: 1 - v),
        "tones grow alike (tonal variation": ("probe_tonal_variation", lambda v: v),
    }
    for words, (name, spread) in spreads.items():
        if name in start and name in values and spread(values[name]) < 0.8 * spread(start[name]):
            found[name] = (
                f"{gained} while {words} {start[name]:.3g} -> {values[name]:.3g}): the model is collapsing; lower the "
                "learning rate, set an anchor, or take an earlier checkpoint"
            )
    return found
