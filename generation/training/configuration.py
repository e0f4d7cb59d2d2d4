"""Settings of a run: dataclasses that check themselves, read YAML, make the command line and echo all they hold."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from mmalign.errors import InputError, reason_of
from mmalign.files import whole_file

from ..data.rows import MAX_PIXELS
from ..pipelines import guess_family
from .presets import PRESETS, Preset

__all__ = [
    "Place",
    "RunConfig",
    "Texts",
    "TrainingConfig",
    "differences",
    "dry_run_of",
    "inherited",
    "load_config",
    "read_yaml",
    "setting",
    "settings",
    "to_dict",
    "unlike_given",
    "write_config",
]

_STRICT = ConfigDict(
    extra="forbid",
    validate_default=True,
    validate_assignment=True,
    arbitrary_types_allowed=True,
    allow_inf_nan=False,
)

# A name or a place: a Path is welcome from Python, and text in the end, as hub ids are.
Place = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
_Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    BeforeValidator(lambda value: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value),
]

Config = TypeVar("Config", bound="RunConfig")
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
_Share = Annotated[float, Field(ge=0, lt=1)]


def setting(default: Any, text: str, *, panel: str = "", fixed: bool = True, **limits: Any) -> Any:
    """A field with its help text and limits (pydantic's: ge, gt, le, lt, multiple_of, min_length).

    `fixed` ones cannot change when a run is resumed; `panel` is the heading that the command's help puts it under, the
    method's own by default.
    """
    # pydantic copies a list for each config
    about: Any = {"fixed": fixed, "panel": panel, "limits": limits}
    return Field(default=default, description=text, json_schema_extra=about, **limits)


def inherited(kind: type[RunConfig], name: str, default: Any) -> Any:
    """The setting of this name as another config has it, with another default."""
    about: Any = next(field.default for field in dataclasses.fields(kind) if field.name == name)
    made: dict[str, Any] = about.json_schema_extra
    return setting(default, about.description, panel=made["panel"], fixed=made["fixed"], **made["limits"])


@dataclass_transform(kw_only_default=True)
def settings(cls: type[Config]) -> type[Config]:
    """Make a class of `setting`s a dataclass that resolves its preset and refuses with an InputError in one line."""
    made: Any = dataclass(config=_STRICT, kw_only=True)(cls)
    initialise, assign = made.__init__, made.__setattr__

    @functools.wraps(initialise)
    def __init__(self: Config, **given: Any) -> None:
        _refuse_unknown(type(self), given)
        with _told_in_one_line():
            initialise(self, **(_preset(type(self), given) | given))

    @functools.wraps(assign)
    def __setattr__(self: Config, name: str, value: Any) -> None:
        _refuse_unknown(type(self), [name])
        if name == "preset":
            raise InputError("a preset takes effect when the settings are made; give it there")
        with _told_in_one_line():
            assign(self, name, value)

    made.__init__, made.__setattr__ = __init__, __setattr__
    return made


_options = partial(setting, panel="Options")
_data = partial(setting, panel="Data")
_trained = partial(setting, panel="What is trained")
_optimisation = partial(setting, panel="Optimisation")
_looking = partial(setting, panel="Checkpoints and looking on", fixed=False)


@settings
class RunConfig:
    """What every trainer needs, whatever it trains on.

    Attributes:
        method: its name on the command line.
        summary: what it is, in a line.
        data_kinds: what `data` may be, for people.
        explanation: what else a first-time user should know, for people.
        example: what a first run has to name.
        presets: settings by card size.
    """

    method: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Preset]] = PRESETS
    data_kinds: ClassVar[str] = ""
    explanation: ClassVar[str] = ""
    example: ClassVar[str] = "DATA OUTPUT"

    data: Place = _options("", "What is trained on.", fixed=False)  # a checkpoint knows the content
    output: Path = _options(Path(), "Run folder: settings, checkpoints, samples, the finished LoRA.", fixed=False)
    model: Place = _options(
        "stabilityai/stable-diffusion-xl-base-1.0", "Pipeline to train: hub id, folder, single file, or tiny:sdxl."
    )
    vae: Place | None = _options(None, "Another VAE: hub id or folder.")
    variant: str | None = _options(None, "Weight variant of the hub repository, e.g. fp16.")
    preset: str | None = _options(
        None,
        f"Memory preset: {', '.join(PRESETS)}; your own settings win over it.",
        fixed=False,
    )
    dry_run: bool = _options(
        False, "Try everything with a tiny model of the same family and 4 steps, in OUTPUT/dry-run.", fixed=False
    )

    resolution: int = _data(
        1024, "Side of the training canvas in pixels; with buckets the side of its area.", ge=64, multiple_of=8
    )
    cache: bool = _data(True, "Encode images and captions once, before training, and free the encoders.", fixed=False)
    cache_dir: Path | None = _data(
        None, "Where latents and embeddings are kept, for all runs. (default: cache/ beside OUTPUT)", fixed=False
    )
    cache_dtype: Literal["float16", "float32"] = _data("float16", "Precision of cached latents and embeddings.")
    workers: int | None = _data(None, "Threads that decode and load. (default: one a core)", fixed=False, ge=1)

    adaptation: Literal["lora", "full"] = _trained("lora", "Train a LoRA, or all weights of the denoiser.")
    rank: int = _trained(64, "LoRA rank.", ge=1)
    alpha: float | None = _trained(
        None, "LoRA alpha; another value than the rank is misread by some tools. (default: rank)", gt=0
    )
    targets: list[str] = _trained(
        ["to_q", "to_k", "to_v", "to_out.0"], "Layers that get a LoRA; may repeat.", min_length=1
    )
    lora_dropout: float = _trained(0.0, "Dropout before the LoRA.", ge=0, lt=1)
    dora: bool = _trained(False, "Weight-decomposed LoRA (arXiv 2402.09353).")
    rslora: bool = _trained(False, "Scale by alpha / sqrt(rank) (arXiv 2312.03732).")

    steps: int = _optimisation(2000, "Optimiser steps.", fixed=False, ge=1)
    batch_size: int = _optimisation(4, "Samples (pairs, for a method over pairs) per forward pass and GPU.", ge=1)
    accumulation: int = _optimisation(4, "Forward passes per optimiser step.", ge=1)
    learning_rate: float = _optimisation(1e-5, "Peak learning rate.", gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = _optimisation("constant", "What follows the warm-up.")
    warmup_steps: int = _optimisation(0, "Optimiser steps of linear warm-up.", ge=0)
    optimizer: Literal["adamw", "adamw8bit"] = _optimisation("adamw", "adamw8bit needs bitsandbytes.")
    adam_betas: tuple[_Share, _Share] = _optimisation((0.9, 0.999), "Decay of Adam's two moments.")
    weight_decay: float = _optimisation(1e-2, "AdamW's weight decay.", ge=0)
    adam_epsilon: float = _optimisation(1e-8, "AdamW's epsilon.", gt=0)
    max_grad_norm: float = _optimisation(1.0, "Gradients are clipped to this norm.", gt=0)
    ema_decay: float | None = _optimisation(
        None, "Also keep a moving average of the trained weights, and export that.", gt=0, lt=1
    )
    dtype: _Dtype = _optimisation(
        "auto", "Of the frozen weights and the forward pass; adapters are float32 always. (auto: bfloat16 on a GPU)"
    )
    gradient_checkpointing: bool = _optimisation(
        False, "Recompute activations: less memory, 1.46 x the arithmetic.", fixed=False
    )
    seed: int = _optimisation(
        0, "Names the whole run: order, noise, timesteps, LoRA initialisation.", ge=0, le=2**63 - 1
    )
    device: str | None = _optimisation(None, "cpu, cuda, cuda:1, mps. (default: the fastest present)", fixed=False)

    checkpoint_every: int = _looking(500, "Steps between checkpoints.", ge=1)
    keep_checkpoints: int = _looking(3, "How many of the newest to keep.", ge=1)
    probe_every: int = _looking(50, "Steps between two looks at the fixed probe samples.", ge=1)
    probe_size: int = _looking(16, "Samples in the probe; 0 for none.", fixed=True, ge=0)
    validation_prompts: Texts = _looking([], "Prompt to render while training, or several; may repeat.")
    validate_every: int = _looking(250, "Steps between renderings.", ge=1)
    validation_steps: int = _looking(25, "Denoising steps of a rendering.", ge=1)
    validation_guidance: float = _looking(5.0, "Guidance scale of a rendering.", ge=0)
    tensorboard: bool = _looking(False, "Log to OUTPUT/tensorboard.")
    wandb: str | None = _looking(None, "Log to this Weights & Biases project.")
    progress: bool = _looking(False, "Show a progress bar.")

    def in_small(self) -> dict[str, Any]:
        """Settings of the method's own that a dry run changes as well."""
        return {}


@settings
class TrainingConfig(RunConfig):
    """What every trainer on stored images needs. A method's own config derives from this; it adds hyperparameters."""

    data_kinds: ClassVar[str] = """Parquet (jpg_0, jpg_1, label_0, caption); a folder with metadata.jsonl,
with winner/ and loser/, of save_to_disk, or of webdataset tars; datasets:NAME.
`mmalign data check --help` says more of them."""
    explanation: ClassVar[str] = "Rows are checked before anything else."

    split: str | None = _data(None, "Split of a datasets: set. (default: train)", fixed=False)
    bad_rows: Literal["skip", "refuse"] = _data("skip", "What to do when rows cannot be used.", fixed=False)
    max_pixels: int = _data(MAX_PIXELS, "Leave out images of more pixels.", ge=1)
    filter_encoder: str | None = _data(
        None, "Encoder whose cosine of caption and image min_score and min_margin refer to, e.g. bundled."
    )
    min_score: float | None = _data(None, "Leave out rows whose winner scores less.")
    min_margin: float | None = _data(None, "Leave out pairs whose winner scores less than this above the loser.")
    aspect_buckets: bool = _data(False, "Canvases of several aspect ratios instead of one square; a pair shares one.")
    random_flip: bool = _data(False, "Mirror half of the samples (both images of a pair); doubles the cache.")
    caption_dropout: float = _data(0.0, "Share of samples trained on the unconditional embedding.", ge=0, le=1)


def load_config(kind: type[Config], given: Mapping[str, Any], file: str | os.PathLike[str] | None = None) -> Config:
    """Settings from, in rising order: defaults, the preset, a YAML file, `given`.

    Raises:
        InputError: the file is not to be read, a key is unknown, or a value does not fit; all named in one line.
    """
    written = read_yaml(Path(file)) if file else {}
    chosen = {**written, **given}
    method = chosen.pop("method", kind.method)
    if method != kind.method:
        raise InputError(f"{str(file)!r} holds settings of {method!r}, not of {kind.method!r}; use the method's own")
    _refuse_unknown(kind, (name for name in written if name != "method"), f" in {str(file)!r}")
    return kind(**chosen)


def dry_run_of(config: Config, family: str | None = None) -> Config:
    """The same run in small: a tiny model of the same family, 64 px, 4 steps, in OUTPUT/dry-run.

    Args:
        config: of the real run; one that is small already is returned as it is.
        family: of the model, where it is known; else `guess_family` tells.
    """
    reduced: dict[str, Any] = {
        "model": f"tiny:{family or guess_family(config.model)}",
        "vae": None,
        "variant": None,
        # what is checked here is checked for the real run
        "cache_dir": config.cache_dir or config.output.parent / "cache",
        "resolution": 64,
        "steps": 4,
        "batch_size": min(config.batch_size, 2),
        "accumulation": min(config.accumulation, 2),
        "rank": min(config.rank, 4),
        "checkpoint_every": 2,
        "probe_every": 2,
        "probe_size": min(config.probe_size, 4),
        "validate_every": 4,
        "validation_steps": 2,
        "wandb": None,
    }
    small = dataclasses.replace(config, **{**reduced, **config.in_small()})
    if small == config and config.output.name == "dry-run":
        return config
    return dataclasses.replace(small, output=config.output / "dry-run")


def unlike_given(config: RunConfig, small: RunConfig) -> list[str]:
    """Settings other than the defaults that a dry run does without: "rank 4 instead of 999"."""
    plain, now = to_dict(config), to_dict(small)
    default = to_dict(type(config)())
    chosen = [name for name in plain if plain[name] != default[name] and name not in ("model", "output", "cache_dir")]
    return [
        f"no {name} {plain[name]}" if now[name] is None else f"{name} {now[name]} instead of {plain[name]}"
        for name in chosen
        if now[name] != plain[name]
    ]


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The method and every setting as plain values, in the order of definition."""
    plain: dict[str, Any] = {"method": config.method}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain[field.name] = (
            str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        )
    return plain


def write_config(config: RunConfig, path: Path) -> None:
    """All values as YAML that `load_config` reads."""
    with whole_file(path) as fresh:
        fresh.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def differences(config: RunConfig, saved: Mapping[str, Any]) -> list[str]:
    """Settings that a resumed run must not change but would: "rank 64 -> 32"."""
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(config)}
    fixed = {"method", *(name for name, about in fields.items() if about.json_schema_extra["fixed"])}
    if config.lr_schedule != "constant":
        fixed.add("steps")  # the schedule is a function of the total
    changed = {n: (saved[n], v) for n, v in to_dict(config).items() if n in fixed and n in saved and saved[n] != v}
    return [f"{name} {before!r} -> {after!r}" for name, (before, after) in changed.items()]


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings in a YAML file; raises InputError in one line."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {str(path)!r} cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or the 45th of a month
        raise InputError(f"config {str(path)!r} is not valid YAML ({reason_of(error)})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"config {str(path)!r} must hold `name: value` lines, not {type(content).__name__}")
    return content


def _preset(kind: type[RunConfig], given: Mapping[str, Any]) -> dict[str, Any]:
    names = given.get("preset")
    if names is None:
        return {}
    found: dict[str, Any] = {}
    for name in map(str.strip, names.split(",")) if isinstance(names, str) else [names]:
        if name not in list(kind.presets):  # a list: YAML may hold what cannot be hashed
            raise InputError(
                f"preset {name!r} is not known; use one of {', '.join(kind.presets)}, or several with commas between"
            )
        found |= kind.presets[name].settings(given)
    return found


def _refuse_unknown(kind: type[RunConfig], names: Iterable[str], where: str = "") -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for name in names:
        if name not in known:
            likely = difflib.get_close_matches(str(name), known, n=2)
            asked = f"; did you mean {' or '.join(likely)}?" if likely else ""
            raise InputError(f"{name!r}{where} is not a setting of {kind.method or kind.__name__}{asked}")


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise InputError("; ".join(_explain(entry) for entry in error.errors())) from None


def _explain(entry: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in entry["loc"]) or "settings"
    message = str(entry["msg"]).removeprefix("Value error, ")
    return f"{name} is {entry['input']!r}: {message[:1].lower()}{message[1:]}"
