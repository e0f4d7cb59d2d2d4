"""Where settings come from, which ones are refused and how, and what a run folder remembers of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from generation.methods import METHODS, MaPOConfig, RewardGradientConfig, RewardWeightedConfig
from generation.training import RewardConfig
from generation.training.configuration import (
    RunConfig,
    TrainingConfig,
    differences,
    dry_run_of,
    load_config,
    setting,
    settings,
    to_dict,
    write_config,
)
from generation.training.presets import PRESETS
from mmalign.errors import InputError

KINDS = [trainer.config_class for trainer in METHODS.values()]
# One other value for every setting that all methods have; a new setting must be added here.
OTHER: dict[str, Any] = {
    "data": "pairs/", "output": Path("runs/ünïcode: 1"), "model": "tiny:sdxl", "vae": "other/vae", "variant": "fp16",
    "preset": "48gb", "dry_run": True, "split": "validation", "bad_rows": "refuse", "max_pixels": 1,
    "filter_encoder": "bundled", "min_score": 0.1, "min_margin": -0.2, "resolution": 512,
    "aspect_buckets": True, "random_flip": True, "caption_dropout": 0.1, "cache": False, "cache_dir": Path("/tmp/c"),
    "cache_dtype": "float32", "workers": 3, "adaptation": "full", "rank": 8, "alpha": 4.5, "targets": ["to_q"],
    "lora_dropout": 0.2, "dora": True, "rslora": True, "steps": 7, "batch_size": 3, "accumulation": 5,
    "learning_rate": 3e-7, "lr_schedule": "cosine", "warmup_steps": 10, "optimizer": "adamw8bit",
    "adam_betas": (0.8, 0.95), "weight_decay": 0.0, "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "ema_decay": 0.9999,
    "dtype": "bfloat16", "gradient_checkpointing": True, "seed": 2**63 - 1, "device": "cpu", "checkpoint_every": 9,
    "keep_checkpoints": 1, "probe_every": 4, "probe_size": 0, "validation_prompts": ["a: 'dog'", "- 猫", "yes"],
    "validate_every": 2, "validation_steps": 3, "validation_guidance": 0.0, "tensorboard": True, "wandb": "no",
    "progress": True,
}  # fmt: skip
OTHER_OF_REWARDS: dict[str, Any] = {
    **{field.name: OTHER[field.name] for field in dataclasses.fields(RunConfig)},
    "reward": ["redness=2", "cosine:bundled"], "held_out_reward": ["redness"], "held_out_prompts": "other.txt",
    "probe_images": 3, "diversity_encoder": "bundled", "patience": 4, "sampling_steps": 11, "guidance": 2.5,
    "sampler": "own", "eta": 0.5, "vae_dtype": "bfloat16", "gradient_steps": "last:3", "input_grad": False,
    "reward_input": "direct-align", "copies": 5, "inversion": 0.5, "checkpoint_steps": False, "uncond_grad": False,
    "loss": "hinge", "reward_threshold": 0.5, "loss_scale": 2.0, "anchor": "l2", "anchor_weight": 0.5,
}  # fmt: skip
# Settings that decide nothing about the numbers of a step.
FREE = {
    "data", "split", "preset", "output", "dry_run", "bad_rows", "cache", "cache_dir", "workers", "steps", "device",
    "gradient_checkpointing", "checkpoint_every", "keep_checkpoints", "probe_every", "validation_prompts",
    "validate_every", "validation_steps", "validation_guidance", "tensorboard", "wandb", "progress",
}  # fmt: skip

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "run.yaml"

    return make


def refusal(given: dict[str, Any], file: Path | None = None, kind: type[RunConfig] = MaPOConfig) -> str:
    with pytest.raises(InputError) as caught:
        load_config(kind, given, file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_those_of_the_published_recipe() -> None:
    """shared/methods/sdxl-training.md, section 9."""
    config = MaPOConfig()
    assert (config.beta, config.snr_value, config.min_snr_gamma) == (0.1, 0.5, None)
    assert (config.learning_rate, config.lr_schedule, config.warmup_steps) == (1e-5, "constant", 0)
    assert (config.adam_betas, config.weight_decay, config.max_grad_norm) == ((0.9, 0.999), 1e-2, 1.0)
    assert (config.rank, config.alpha, config.targets) == (64, None, ["to_q", "to_k", "to_v", "to_out.0"])
    assert (config.resolution, config.steps, config.checkpoint_every, config.keep_checkpoints) == (1024, 2000, 500, 3)
    assert config.batch_size * config.accumulation >= 16
    assert config.cache
    assert METHODS["diffusion-dpo"].config_class().beta == 5000  # type: ignore[attr-defined]


def test_presets_rise_over_defaults_the_file_over_presets_and_options_over_all(write: Write) -> None:
    assert MaPOConfig().batch_size == 4
    assert not MaPOConfig().gradient_checkpointing
    preset = load_config(MaPOConfig, {"preset": "48gb"})
    assert (preset.batch_size, preset.accumulation) == (2, 8)
    file = write("preset: 48gb\nbatch_size: 3\nlearning_rate: 1e-4\n")
    in_file = load_config(MaPOConfig, {}, file)
    assert (in_file.batch_size, in_file.accumulation, in_file.learning_rate) == (3, 8, 1e-4)
    given = load_config(MaPOConfig, {"batch_size": 1, "preset": "24gb"}, file)
    assert (given.batch_size, given.accumulation, given.learning_rate) == (1, 4, 1e-4)
    assert given.gradient_checkpointing
    assert given.rank == 64


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_steps_of_sixteen_pairs(name: str) -> None:
    for adaptation in ("lora", "full"):
        if adaptation == "full" and PRESETS[name].full is None:
            assert "cannot hold a full fine-tune" in refusal({"preset": name, "adaptation": adaptation})
            continue
        config = load_config(MaPOConfig, {"preset": name, "adaptation": adaptation})
        assert config.batch_size * config.accumulation == 16
    assert load_config(MaPOConfig, {"preset": "24gb"}).gradient_checkpointing  # 12.2 GB of activations a pair
    assert load_config(MaPOConfig, {"preset": "48gb", "adaptation": "full"}).optimizer == "adamw8bit"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.method)
def test_every_value_is_echoed_and_read_again(kind: type[RunConfig], tmp_path: Path) -> None:
    other, parent = (
        (OTHER, TrainingConfig) if issubclass(kind, TrainingConfig) else (OTHER_OF_REWARDS, RewardGradientConfig)
    )
    if not issubclass(kind, parent):  # GRPO
        other, parent = {name: other[name] for name in vars(RewardConfig())}, RewardConfig
    if kind.method == "softrepa":  # trains neither a LoRA nor all weights
        other = other | {"adaptation": "tokens"}
    shared = {field.name for field in dataclasses.fields(parent)}
    own = {field.name for field in dataclasses.fields(kind)} - shared
    assert set(other) == shared
    mine = {"min_snr_gamma": 5.0, "beta": 0.25, "omega": 2.0, "direction_max_norm": 0.5}
    for values in ({}, {**other, **{name: value for name, value in mine.items() if name in own}}):
        config = kind(**values)
        write_config(config, tmp_path / "config.yaml")
        plain = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
        assert list(plain) == ["method"] + [field.name for field in dataclasses.fields(kind)]
        again = load_config(kind, {}, tmp_path / "config.yaml")
        assert again == config
        assert [type(value) for value in vars(again).values()] == [type(value) for value in vars(config).values()]
    default = kind()
    # a method may have one of these values as its default
    assert sum(getattr(config, name) == getattr(default, name) for name in shared) <= 2


def test_python_is_told_the_same_as_the_command_line() -> None:
    """Presets, refusals and suggestions do not need `load_config`."""
    config = MaPOConfig(preset="24gb", accumulation=2)
    assert (config.batch_size, config.gradient_checkpointing, config.accumulation) == (4, True, 2)
    for make in (
        lambda: MaPOConfig(preset="zz"),
        lambda: MaPOConfig(rank=0, steps=0),
        lambda: MaPOConfig(learning_rte=1e-5),  # type: ignore[call-arg]
        lambda: MaPOConfig(preset="24gb", adaptation="full"),
        lambda: MaPOConfig(seed=2**63),
        lambda: dataclasses.replace(config, rank=0),
        lambda: setattr(config, "rank", 0),
        lambda: setattr(config, "learning_rte", 1e-5),
        lambda: setattr(config, "preset", "48gb"),
    ):
        with pytest.raises(InputError) as caught:
            make()
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="did you mean learning_rate"):
        MaPOConfig(learning_rte=1e-5)  # type: ignore[call-arg]
    config.rank = 7
    assert config.rank == 7
    assert MaPOConfig(dtype=torch.bfloat16).dtype == "bfloat16"  # type: ignore[arg-type]


def test_a_class_of_ones_own_settings_is_told_alike() -> None:
    @settings
    class OwnConfig(MaPOConfig):
        strength: float = setting(1.0, "How much.", ge=0)

    assert OwnConfig(strength=2, preset="48gb").batch_size == 2
    with pytest.raises(InputError, match="strength is -1"):
        OwnConfig(strength=-1)
    with pytest.raises(InputError, match="strength is -2"):
        OwnConfig().strength = -2


def test_defaults_are_not_shared_between_configs() -> None:
    first = MaPOConfig()
    first.targets.append("proj_in")
    first.validation_prompts.append("a dog")
    assert MaPOConfig().targets == ["to_q", "to_k", "to_v", "to_out.0"]
    assert MaPOConfig().validation_prompts == []


def test_an_unknown_setting_is_refused_with_a_suggestion(write: Write) -> None:
    message = refusal({}, write("learning_rte: 1e-5"))
    assert "'learning_rte'" in message
    assert "run.yaml" in message
    assert "did you mean learning_rate?" in message
    assert "is not a setting of rwl" in refusal({"snr_value": 1.0}, kind=RewardWeightedConfig)
    assert "did you mean" not in refusal({"zzzzzz": 1})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rank": 0}, "rank is 0: input should be greater than or equal to 1"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"resolution": 100}, "resolution is 100: input should be a multiple of 8"),
        ({"resolution": 56}, "resolution is 56"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas.1 is 1.0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"targets": []}, "targets is []"),
        ({"targets": "to_q"}, "targets is 'to_q'"),
        ({"lr_schedule": "polynomial"}, "'constant', 'linear' or 'cosine'"),
        ({"beta": -1}, "beta is -1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"preset": "12gb"}, "preset '12gb' is not known; use one of 24gb, 48gb, 80gb"),
        ({"preset": ["24gb"]}, "preset ['24gb'] is not known"),
        ({"rank": 0, "steps": 0}, "rank is 0: input should be greater than or equal to 1; steps is 0"),
    ],
)
def test_a_value_that_does_not_fit_is_named(given: dict[str, Any], expected: str) -> None:
    assert expected in refusal(given)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x: 1\n y: 2", "is not valid YAML"),
        ("- rank: 8", "must hold `name: value` lines, not list"),
        ("rank", "must hold `name: value` lines, not str"),
        ("data: 2024-13-45", "is not valid YAML"),
        ("data: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("1: 2", "1 in "),
        ("\x00", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(write: Write, content: str, expected: str) -> None:
    file = write(content)
    assert expected in refusal({}, file)
    assert repr(str(file)) in refusal({}, file)


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in refusal({}, tmp_path / "none.yaml")
    assert "cannot be read (Is a directory)" in refusal({}, tmp_path)
    (tmp_path / "latin.yaml").write_bytes("data: caf\xe9".encode("latin-1"))
    assert "is not valid YAML" in refusal({}, tmp_path / "latin.yaml")


def test_an_empty_file_holds_defaults(write: Write) -> None:
    assert load_config(MaPOConfig, {}, write("# nothing\n")) == MaPOConfig()


def test_only_settings_that_change_the_numbers_must_stay(tmp_path: Path) -> None:
    saved = yaml.safe_load(yaml.safe_dump(to_dict(MaPOConfig())))
    assert differences(MaPOConfig(), saved) == []
    named = set()
    for name, value in OTHER.items():
        # A schedule makes the number of steps matter; looked at below.
        found = differences(dataclasses.replace(MaPOConfig(), **{name: value}), saved)
        assert len(found) <= 1
        named |= {line.split()[0] for line in found}
    assert named == set(OTHER) - FREE
    assert differences(MaPOConfig(beta=0.2), saved) == ["beta 0.1 -> 0.2"]
    assert differences(MaPOConfig(rank=8, seed=1), saved) == ["rank 64 -> 8", "seed 0 -> 1"]


def test_steps_must_stay_where_the_schedule_ends_with_them() -> None:
    for schedule in ("linear", "cosine"):
        saved = to_dict(MaPOConfig(lr_schedule=schedule))
        assert differences(MaPOConfig(lr_schedule=schedule, steps=3000), saved) == ["steps 2000 -> 3000"]
    assert differences(MaPOConfig(steps=3000), to_dict(MaPOConfig())) == []


def test_settings_that_an_older_run_did_not_know_are_no_difference() -> None:
    saved = to_dict(MaPOConfig())
    del saved["snr_value"]
    assert differences(MaPOConfig(snr_value=0.7), saved) == []


@pytest.mark.parametrize(
    ("model", "tiny"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "tiny:sdxl"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tiny:sd15"),
        ("runwayml/stable-diffusion-v1-5", "tiny:sd15"),
        ("stabilityai/stable-diffusion-2-1", "tiny:sd15"),
        ("stabilityai/stable-diffusion-3.5-medium", "tiny:sd3"),
        ("black-forest-labs/FLUX.1-dev", "tiny:flux"),
        *((f"tiny:{family}", f"tiny:{family}") for family in ("sdxl", "sd15", "sd3", "flux")),
    ],
)
def test_a_dry_run_is_the_same_run_in_small(model: str, tiny: str) -> None:
    config = MaPOConfig(
        data="pairs", output=Path("runs/a"), cache_dir=Path("big"), model=model, vae="other/vae", variant="fp16",
        beta=0.3, random_flip=True, dora=True, targets=["to_q"], gradient_checkpointing=True, wandb="project", rank=2,
    )  # fmt: skip
    small = dry_run_of(config)
    assert (small.model, small.vae, small.variant, small.wandb) == (tiny, None, None, None)
    assert small.output == Path("runs/a/dry-run")
    assert small.cache_dir == Path("big")
    assert dry_run_of(MaPOConfig(output=Path("runs/a"))).cache_dir == Path("runs/cache")  # as the real run's
    assert dry_run_of(small) == small  # and not in dry-run/dry-run
    assert small.resolution == 64
    assert small.steps <= 8
    assert small.batch_size * small.accumulation <= 4
    kept = ("data", "beta", "random_flip", "dora", "targets", "gradient_checkpointing", "seed", "rank", "learning_rate")
    assert all(getattr(small, name) == getattr(config, name) for name in kept)
    assert dry_run_of(MaPOConfig()).rank <= 8
    assert config.steps == 2000
    assert type(dry_run_of(RewardWeightedConfig(beta=0.0))) is RewardWeightedConfig


def test_one_validation_prompt_need_not_be_in_a_list(write: Write) -> None:
    assert MaPOConfig(validation_prompts="a dog").validation_prompts == ["a dog"]  # type: ignore[arg-type]
    assert load_config(MaPOConfig, {}, write("validation_prompts: a dog")).validation_prompts == ["a dog"]


def test_a_dry_run_of_a_folder_is_of_its_family(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    assert dry_run_of(MaPOConfig(model=tmp_path)).model == "tiny:sd3"


def test_methods_on_rewards_differ_by_their_published_settings() -> None:
    """shared/methods/alignprop.md, sections 2 and 5; d2-align.md, section 5."""
    made: dict[str, Any] = {name: METHODS[name].config_class() for name in METHODS}
    steps = {name: config.gradient_steps for name, config in made.items() if hasattr(config, "gradient_steps")}
    assert steps == {
        "alignprop": "uniform", "draft": "last:1", "draft-lv": "last:1", "refl": "one:30:39", "direct-align": "one",
        "d2-align": "one",
    }  # fmt: skip
    inputs = {name: made[name].reward_input for name in steps}
    assert inputs == {
        "alignprop": "sample", "draft": "sample", "draft-lv": "renoise", "refl": "estimate",
        "direct-align": "direct-align", "d2-align": "direct-align",
    }  # fmt: skip
    assert (made["alignprop"].rank, made["alignprop"].learning_rate, made["alignprop"].guidance) == (4, 1e-3, 7.5)
    assert (made["alignprop"].sampling_steps, made["alignprop"].eta, made["alignprop"].sampler) == (50, 0.0, "ddim")
    assert (made["refl"].sampling_steps, made["refl"].guidance, made["refl"].input_grad) == (40, 1.0, False)
    d2 = made["d2-align"]
    assert (d2.omega, d2.direction_steps, d2.direction_lr, d2.max_grad_norm) == (1.5, 3000, 5e-6, 0.1)
    assert (d2.sampling_steps, d2.guidance, d2.accumulation, d2.weight_decay) == (25, 1.0, 2, 1e-4)
    with pytest.raises(InputError, match="rank is 0"):
        METHODS["alignprop"].config_class(rank=0)  # limits are inherited with the default changed
