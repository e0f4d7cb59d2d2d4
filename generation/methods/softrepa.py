"""SoftREPA (arXiv 2503.08250): soft tokens that make an image's own caption denoise it better than others do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.errors import InputError

from ..data import CheckedData
from ..objectives import SoftREPATerms, denoising_matrix, softrepa_loss
from ..pipelines import pipeline_family
from ..soft_tokens import STAGES, SoftTokens
from ..training.caption_contrast import ContrastBatch, ContrastSet, fitting, grid_of, hold_out, joined
from ..training.configuration import RunConfig, TrainingConfig, inherited, setting, settings
from ..training.denoiser import Batch, Conditioning, Denoiser
from ..training.denoising import DenoisingTrainer
from ..training.flow_denoiser import FlowDenoiser
from ..training.monitor import mean_of
from ..training.preparation import Encoders
from ..training.presets import Preset, both
from ..training.randomness import normal, stream
from ..training.token_adaptation import TokenAdaptation

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SoftREPAConfig", "SoftREPATrainer"]

_LORA_SETTINGS = ("rank", "alpha", "targets", "lora_dropout", "dora", "rslora")
_FALL = 0.05  # of the held-out accuracy, to be warned of; proposed, not published
_DEAD = 10  # exp(-10) = 5e-5
_DRIFT = 0.2  # of the held-out denoising error, as for preference pairs


@settings
class SoftREPAConfig(TrainingConfig):
    """Settings of `SoftREPATrainer`; the defaults are the released recipe but for a constant learning rate.

    What it is known to cost: FID gets worse for SDXL and SD3 (24.59 -> 23.43 for SD 1.5, but 24.69 -> 26.04 and 31.59
    -> 36.21, in the paper), and counting for SD3 (GenEval 0.56 -> 0.29): objects are repeated. Its loss falls on while
    that happens, since errors of other captions can be pushed up without end. Go by `probe_match_accuracy` of held-out
    pairs, look at pictures, and count.
    """

    method: ClassVar[str] = "softrepa"
    summary: ClassVar[str] = "SoftREPA: soft text tokens, captioned images alone (arXiv 2503.08250)."
    data_kinds: ClassVar[str] = """captioned images: a folder with metadata.jsonl (file_name, caption),
webdataset tars (.jpg, .png or .webp with .txt or .json), Parquet (image, caption),
datasets:NAME. Or pairs, whose winners are taken."""
    explanation: ClassVar[str] = """PROBE_SIZE pairs are held out: the share of them whose own caption denoises best
is the score to end by. FID and counting may get worse."""
    # SDXL at 512 px, by the arithmetic of `training.presets`: 1.5 GB of activations an image, a row is four.
    presets: ClassVar[Mapping[str, Preset]] = {
        "24gb": both("24gb", row_chunk=2),
        "48gb": both("48gb", row_chunk=4),
        "80gb": both("80gb", row_chunk=4),
    }

    scale: float = setting(4.0, "Largest logit.", gt=0)
    temperature: float = setting(0.07, "Of exp(-error / temperature) in the logits.", gt=0)
    denoising_weight: float | None = setting(
        None, "Weight of the images' own denoising error. (default: 0 for SD3, 10 for UNets)", ge=0
    )
    symmetric: bool = setting(False, "Also ask which image a caption belongs to; not in the paper.")
    caption_bank: int = setting(0, "Captions of other pairs beside those of each batch, as more wrong ones.", ge=0)
    row_chunk: int | None = setting(
        None, "Images at a time, each under all captions; saves memory, same gradient. (default: the batch)", ge=1,
        fixed=False,
    )  # fmt: skip
    tokens: int = setting(4, "Soft tokens of a set.", ge=1)
    layers: int = setting(5, "First blocks of an MMDiT, each with a set of its own.", ge=1)
    time_table: bool | None = setting(None, "Shift the tokens by the timestep. (default: for all but SDXL)")
    stages: list[str] = setting([], "Of a UNet, down, mid or up; may repeat. (default: down, for SDXL down and mid)")
    probe_draws: int = setting(4, "Noises and timesteps that held-out pairs are looked at with.", fixed=True, ge=1)
    patience: int | None = setting(
        None,
        "End after so many looks without a better match accuracy of held-out pairs; the best tokens are then in "
        "OUTPUT/best.",
        fixed=False,
        ge=1,
    )

    adaptation: Literal["tokens"] = setting(  # type: ignore[assignment]
        "tokens", "Soft tokens; settings of LoRAs mean nothing here.", panel="What is trained"
    )
    resolution: int = inherited(RunConfig, "resolution", 512)
    accumulation: int = inherited(RunConfig, "accumulation", 1)
    learning_rate: float = inherited(RunConfig, "learning_rate", 1e-3)
    weight_decay: float = inherited(RunConfig, "weight_decay", 1e-4)
    probe_every: int = inherited(RunConfig, "probe_every", 250)
    probe_size: int = setting(
        16, "Pairs held out of training to look at; 0 for none.", panel="Checkpoints and looking on", ge=0
    )

    def in_small(self) -> dict[str, Any]:
        """Two blocks are all that the tiny MMDiT has."""
        return {"layers": min(self.layers, 2), "rank": self.rank, "row_chunk": None}


class SoftREPATrainer(DenoisingTrainer):
    """Every image of a batch is denoised under every caption, from one noise and at one timestep for all.

    Attributes:
        denoiser: of a UNet, or of SD3's transformer.
    """

    config_class = SoftREPAConfig
    config: SoftREPAConfig
    unit = "winners"
    families = ("sdxl", "sd15", "sd3")  # type: ignore[assignment]
    shown: ClassVar[Mapping[str, tuple[str, str]]] = {
        "loss": ("loss", "{:.4f}"),
        "matched": ("match_accuracy", "{:.0%}"),
        "held out": ("probe_match_accuracy", "{:.0%}"),
        "memory": ("peak_memory_gb", "{:.1f} GB"),
    }
    panels: Mapping[str, tuple[str, ...]] = {
        "loss": ("loss", "probe_loss"),
        "own caption denoises best": ("match_accuracy", "probe_match_accuracy", "probe_pair_accuracy"),
        "denoising error, own caption": ("mse", "probe_mse"),
        "gradient norm": ("grad_norm",),
    }
    denoiser: Denoiser | FlowDenoiser  # type: ignore[assignment]
    _start: Float[Tensor, " width"] | None = None

    def loss(self, batch: ContrastBatch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """`softrepa_loss`; values of each image."""
        errors = self._errors(batch.images, batch.captions)
        terms = self._terms(errors, batch.own, batch.equal, symmetric=self.config.symmetric)
        return terms.loss, {
            "contrastive": terms.contrastive.detach(),
            "mse": terms.matched.detach(),
            "match_accuracy": terms.ranked_right.float(),
        }

    def check_settings(self) -> None:
        """Refuse batches without another caption, and parts that cannot be had."""
        super().check_settings()
        config = self.config
        if config.batch_size == 1 and not config.caption_bank:
            raise InputError(
                "batch_size is 1, which leaves no other caption to tell an image's own from; give 2 or more, or a "
                "caption_bank"
            )
        chunk = config.row_chunk or config.batch_size
        if config.batch_size % chunk:
            raise InputError(
                f"row_chunk {chunk} does not divide batch_size {config.batch_size}, and parts have to be equal; give "
                "one that does"
            )
        if config.symmetric and chunk < config.batch_size:
            raise InputError(f"symmetric needs all images of a batch at once, not {chunk}; leave out row_chunk")
        if config.caption_dropout:
            raise InputError("caption_dropout takes away what an image is told by; leave it out")
        if config.probe_size == 1:
            raise InputError("probe_size is 1, but held-out pairs are told from each other; give 2 or more, or 0")
        if config.patience is not None and not config.probe_size:
            raise InputError("patience goes by held-out pairs, and probe_size is 0; give 2 or more")
        if unknown := [stage for stage in config.stages if stage not in STAGES]:
            raise InputError(f"stages has {unknown[0]!r}; give some of {', '.join(STAGES)}")

    def encode_rows(self, checked: list[CheckedData], encoders: Encoders) -> ContrastSet:
        """Pairs to train on, and those held out."""
        config = self.config
        default = SoftREPAConfig()
        if unused := [name for name in _LORA_SETTINGS if getattr(config, name) != getattr(default, name)]:
            self.warn(f"{' and '.join(unused)} {'is' if len(unused) == 1 else 'are'} of LoRAs: soft tokens have none")
        family = pipeline_family(encoders.pipeline)
        if family == "sd3" and config.resolution % 16:
            raise InputError(f"resolution {config.resolution} is not a multiple of 16, as SD3 needs; give one that is")
        if family == "sd15":  # as released, tokens begin at the first state of the empty prompt
            self._start = encoders.prompts.encode("")["prompt_embeds"][0]
        trained, held_out = hold_out(checked[0], config.probe_size, config.seed)
        looked_at = None if held_out is None else self._encoded(held_out, self.unit, encoders, seed=config.seed)
        pairs = self._encoded(trained, self.unit, encoders, seed=config.seed)
        return ContrastSet(pairs, looked_at, bank=config.caption_bank, seed=config.seed)

    def adapt(self, network: nn.Module, family: str) -> TokenAdaptation:
        """Put untrained tokens in."""
        config = self.config
        tokens = SoftTokens.initial(
            network,
            stream(config.seed, "soft tokens"),
            count=config.tokens,
            layers=config.layers,
            time_table=config.time_table,
            stages=config.stages or None,
            start=self._start,
        )
        return TokenAdaptation(network, tokens, family)

    def connect(self, pipeline: DiffusionPipeline) -> None:
        """Give the network its noise schedule."""
        flow = pipeline_family(pipeline) == "sd3"
        self.denoiser = (FlowDenoiser if flow else Denoiser)(self.learner.network, pipeline.scheduler.config)
        self._weight = (0.0 if flow else 10.0) if self.config.denoising_weight is None else self.config.denoising_weight

    def update(self, batches: Sequence[ContrastBatch]) -> dict[str, float]:
        """One step, a few images at a time: the cross-entropy is of each by itself."""
        size = self.config.row_chunk or self.config.batch_size
        return self.learner.step([part for batch in batches for part in batch.parts(size)], self.loss)

    def look(self) -> dict[str, float]:
        """Held-out pairs, each image under the captions of all, from fixed noises at timesteps spread evenly.

        `probe_match_accuracy`: share whose own caption has the smallest error, by chance 1 / pairs.
        `probe_pair_accuracy`: share of wrong captions whose error is larger, by chance one half.
        """
        data: Any = self.prepared.data
        pairs: list[Batch] = list(data.probe(self.config.probe_size))
        if not pairs:
            return {}
        with self.learner.averaged():  # what is exported
            looks = list(self._look_at(pairs))
        values = {f"probe_{name}": float(value) for name, value in mean_of(looks).items()}
        self._keep_best(values["probe_match_accuracy"])
        return values

    def judge(self, start: Mapping[str, float], values: Mapping[str, float]) -> dict[str, str]:
        """Warn of held-out pairs told apart worse than before, and of images that get worse."""
        if not values:
            return {}
        found, (step, best), now = {}, self._best_look(), values["probe_match_accuracy"]
        if now < best - _FALL:
            found["match accuracy"] = (
                f"held-out images are told by their own caption in {now:.0%}, after {best:.0%} at step {step}: the "
                "tokens learn their pairs by heart; end about there (patience does, and keeps the best tokens)"
            )
        if values["probe_mse"] > _DEAD * self.config.temperature:
            found["temperature"] = (
                f"the denoising error, {values['probe_mse']:.3g}, is more than {_DEAD} times the temperature "
                f"{self.config.temperature:g}: all logits are about 0 and next to nothing is learnt; raise temperature"
            )
        drift = values["probe_mse"] / start["probe_mse"] - 1
        if drift > _DRIFT:
            found["denoising"] = (
                f"held-out images are denoised {drift:.0%} worse under their own caption than at the start: they will "
                "look worse; lower the learning rate, or raise denoising_weight"
            )
        return found

    def enough(self) -> str | None:
        """Why to end before the last step: no better match accuracy for `patience` looks."""
        patience, (step, best) = self.config.patience, self._best_look()
        since = sum(row["step"] > step for row in self.folder.logged("probe_match_accuracy"))
        if patience is None or since < patience:
            return None
        return (
            f"the match accuracy of held-out pairs was best at step {step} ({best:.0%}) and not better in {since} "
            f"looks since; the tokens of that step are in {self.folder.path / 'best'}. Raise patience to go on"
        )

    def _errors(self, images: Batch, captions: Conditioning) -> Float[Tensor, "b p"]:
        return denoising_matrix(self.denoiser.predict(grid_of(images, captions)), self.denoiser.target(images))

    def _terms(self, errors: Float[Tensor, "b p"], own: Tensor, equal: Tensor, *, symmetric: bool) -> SoftREPATerms:
        return softrepa_loss(
            errors,
            scale=self.config.scale,
            temperature=self.config.temperature,
            denoising_weight=self._weight,
            symmetric=symmetric,
            mask=equal,
            targets=own,
        )

    def _look_at(self, pairs: Sequence[Batch]) -> Iterator[dict[str, Tensor]]:
        """Values of each held-out image at each draw."""
        config, device = self.config, self.accelerator.device
        captions = joined([pair.conditioning for pair in pairs]).to(device)
        fits = fitting(pairs).to(device)
        for draw in range(config.probe_draws):
            time = int((draw + 0.5) / config.probe_draws * self.denoiser.num_train_timesteps)
            for place, pair in enumerate(pairs):
                noise = normal(config.seed, "probe noise", [draw], pair.latents.shape[1:])
                image = replace(pair, noise=noise, timesteps=torch.full_like(pair.timesteps, time)).to(device)
                errors = self._errors(image, captions)
                own = torch.tensor([place], device=device)
                terms = self._terms(errors, own, fits[place : place + 1], symmetric=False)
                others = ~fits[place]
                others[place] = False
                yield {
                    "loss": terms.loss[None],
                    "mse": terms.matched,
                    "match_accuracy": terms.ranked_right.float(),
                    "pair_accuracy": (errors[0, others] > terms.matched).float().mean()[None],
                }

    def _keep_best(self, accuracy: float) -> None:
        """Export to OUTPUT/best what is better than at all looks before, for runs that may end by it."""
        better = all(row["probe_match_accuracy"] < accuracy for row in self.folder.logged("probe_match_accuracy"))
        if self.config.patience is not None and better and self.accelerator.is_main_process:
            self.learner.export(self.folder.path / "best", {"mmalign_steps": str(self.step)})

    def _best_look(self) -> tuple[int, float]:
        """Step and match accuracy of the best look that was logged; 0 and 0 before the first."""
        looks = [(row["step"], row["probe_match_accuracy"]) for row in self.folder.logged("probe_match_accuracy")]
        return max(looks, key=lambda look: look[1], default=(0, 0.0))
