"""Settings of runs on rewards: each reaches what it names, and what has no effect or cannot work is refused early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

import generation.methods.reward_gradient as methods
from generation import tiny_pipeline
from generation.methods import D2AlignConfig, D2AlignTrainer, DRaFTConfig, DRaFTTrainer
from generation.reward_gradient import RewardGradientOptions
from generation.rewards import CosineReward, RewardDirection, WeightedSum
from generation.training.adaptation import MovingAverage
from generation.training.sampler import bare_pipeline
from mmalign import Encoder
from mmalign.errors import InputError

Settings = Callable[..., dict[str, Any]]


def brightness(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
    return torch.stack([image.mean() for image in images])


brightness.differentiable = True  # type: ignore[attr-defined]
brightness.fingerprint = "brightness"  # type: ignore[attr-defined]


def dark(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
    return [-float(image.mean()) for image in images]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "prompts.txt").write_text("a red dog\na blue boat\na small cup\n", encoding="utf-8")

    def of(output: str = "run", **given: Any) -> dict[str, Any]:
        return {
            "data": tmp_path / "prompts.txt", "output": tmp_path / output, "model": "tiny:sdxl", "resolution": 64,
            "device": "cpu", "sampling_steps": 3, "guidance": 3.0, "steps": 1, "batch_size": 2, "accumulation": 1,
            "rank": 2, "learning_rate": 1e-2, "probe_size": 0, "probe_images": 2, **given,
        }  # fmt: skip

    return of


def trained(config: Any, **given: Any) -> tuple[DRaFTTrainer, Any]:
    trainer = DRaFTTrainer(config, reward=given.pop("reward", brightness), held_out=given.pop("held_out", {}), **given)
    return trainer, trainer.train()


def test_switches_reach_the_engine(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[RewardGradientOptions, dict[str, Any]]] = []
    real = methods.graded_latents

    def watched(pipeline: Any, call: Any, options: Any, **rest: Any) -> Any:
        seen.append((options, dict(call)))
        return real(pipeline, call, options, **rest)

    monkeypatch.setattr(methods, "graded_latents", watched)
    switches = {
        "gradient_steps": "one", "input_grad": False, "reward_input": "direct-align", "inversion": 0.5,
        "uncond_grad": False, "anchor": "kl",
    }  # fmt: skip
    trained(DRaFTConfig(**settings("a", **switches, checkpoint_steps=False, eta=0.25)))
    trained(DRaFTConfig(**settings("b", reward_input="renoise", copies=1)))
    assert seen[0][0] == RewardGradientOptions(**switches, checkpointing=False)  # type: ignore[arg-type]
    assert (seen[0][1]["eta"], seen[0][1]["guidance_scale"], seen[0][1]["num_inference_steps"]) == (0.25, 3.0, 3)
    assert seen[1][0] == RewardGradientOptions("last:1", reward_input="renoise", copies=1)
    assert "eta" not in seen[1][1]


def test_the_loss_is_scaled_and_the_anchor_is_added_to_it(settings: Settings) -> None:
    values = {}
    for name, given in (
        ("plain", {}),
        ("scaled", {"loss_scale": 3.0}),
        ("anchored", {"anchor": "l2", "anchor_weight": 50.0, "steps": 2, "gradient_steps": "last:2"}),
    ):
        values[name] = trained(DRaFTConfig(**settings(name, **given)))[1].values
    assert values["scaled"]["loss"] == pytest.approx(3 * values["plain"]["loss"])
    assert values["plain"]["loss"] == pytest.approx(-values["plain"]["reward"])
    anchored = values["anchored"]
    assert anchored["anchor"] > 0
    assert anchored["loss"] == pytest.approx(-anchored["reward"] + 50 * anchored["anchor"], rel=1e-4)


def test_the_vae_decodes_in_the_precision_asked_for_and_recomputes(settings: Settings) -> None:
    trainer, _ = trained(DRaFTConfig(**settings(vae_dtype="bfloat16")))
    assert trainer.sampler.vae.dtype == torch.bfloat16
    assert trainer.sampler.vae.decoder.gradient_checkpointing


def test_the_probe_draws_with_the_averaged_weights(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = [False]
    applied, draw = MovingAverage.applied, DRaFTTrainer.draw
    drawn: list[bool] = []

    @contextlib.contextmanager
    def watched(self: Any) -> Iterator[None]:
        with applied(self):
            inside[0] = True
            yield
        inside[0] = False

    def noting(self: Any, *given: Any) -> Any:
        drawn.append(inside[0])
        return draw(self, *given)

    monkeypatch.setattr(MovingAverage, "applied", watched)
    monkeypatch.setattr(DRaFTTrainer, "draw", noting)
    trained(DRaFTConfig(**settings(ema_decay=0.9, probe_size=1)), held_out={"dark": dark})
    assert drawn == [True, True]


def test_diversity_is_measured_by_the_encoder_named(settings: Settings) -> None:
    values = [
        trained(
            DRaFTConfig(**settings(f"d{encoder}", probe_size=1, diversity_encoder=encoder)), held_out={"dark": dark}
        )[1]
        for encoder in (None, "bundled:image")
    ]
    assert "probe_within_prompt_similarity" not in values[0].values  # neither reward has vectors
    assert 0 < values[1].values["probe_within_prompt_similarity"] <= 1


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_validation_pictures_beside_a_reward_leave_the_vae_where_it_is(
    settings: Settings, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[bool] = []
    monkeypatch.setattr("generation.training.encoding.LatentEncoder.release", lambda self: released.append(True))
    given = {"validation_prompts": ["a fox"], "validation_steps": 2, "model": f"tiny:{family}"}
    trained(DRaFTConfig(**settings(**given)))
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {"step-000000.png", "step-000001.png"}
    assert not released


def test_a_pipeline_without_its_vae_still_knows_its_factor() -> None:
    pipeline: Any = tiny_pipeline("sd15")
    pipeline.vae_scale_factor = 4
    assert bare_pipeline(pipeline, vae=False).vae_scale_factor == 4


def test_d2_settings_reach_the_direction_which_is_learnt_again_when_they_change(
    settings: Settings, tmp_path: Path, bundled: Encoder
) -> None:
    reward = CosineReward(bundled)
    learning: dict[str, Any] = {"direction_images": 4, "direction_steps": 5, "gradient_steps": "one"}

    def direction(output: str = "run", **given: Any) -> RewardDirection:
        config = D2AlignConfig(**settings(output, **{**learning, **given}, checkpoint_every=99))
        trainer = D2AlignTrainer(config, reward=reward, held_out={})
        trainer.accelerator = methods_accelerator(config)
        trainer.folder.path.mkdir(exist_ok=True)
        trainer.check_settings()
        trainer.prepared = trainer.prepare()
        trainer.attach(trainer.prepared.pipeline)
        return trainer.reward.direction  # type: ignore[attr-defined]

    first = direction(direction_lr=0.01)
    assert (first.omega, first.normalize_text, first.renormalize, first.settings["seed"]) == (1.5, True, True, 0)
    assert first.settings["steps"] == 5
    assert torch.equal(direction(direction_lr=0.01).b, first.b)
    other = direction(
        direction_lr=0.05, omega=2.0, normalize_text=False, renormalize=False, direction_max_norm=0.01, seed=3
    )
    assert (other.omega, other.normalize_text, other.renormalize, other.settings["seed"]) == (2.0, False, False, 3)
    assert other.norm <= 0.0101 < first.norm
    given = D2AlignConfig(
        **settings("given", gradient_steps="one", direction=tmp_path / "run" / "direction.safetensors")
    )
    trainer = D2AlignTrainer(given, reward=reward, held_out={})
    trainer.train()
    assert torch.equal(trainer.reward.direction.b, other.b)  # type: ignore[attr-defined]
    assert not (tmp_path / "given" / "direction.safetensors").exists()

    # Vectors of images by another VAE are other vectors.
    keys = []
    for factor in (1.0, -1.0):
        pipeline: Any = tiny_pipeline("sdxl")
        pipeline.vae.decoder.conv_out.weight.data *= factor
        config = D2AlignConfig(**settings(f"vae{factor}", **learning))
        trainer = D2AlignTrainer(config, reward=reward, held_out={}, pipeline=pipeline)
        trainer.train()
        keys.append(trainer.reward.direction.b)  # type: ignore[attr-defined]
    assert not torch.equal(*keys)


def methods_accelerator(config: Any) -> Any:
    from generation.training.hardware import make_accelerator

    return make_accelerator(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward_input": "renoise", "gradient_steps": "uniform"}, 'set gradient_steps to "last:1"'),
        ({"reward_input": "direct-align", "gradient_steps": "last:2"}, 'set gradient_steps to "one"'),
        ({"copies": 4}, "copies 4 has no effect without reward_input renoise"),
        ({"inversion": 0.5}, "inversion 0.5 has no effect"),
        ({"anchor_weight": 2.0}, "anchor_weight 2.0 has no effect without an anchor"),
        ({"uncond_grad": False, "guidance": 1.0}, "uncond_grad False has no effect without guidance"),
        ({"patience": 2}, "patience goes by a held-out reward"),
        ({"model": "tiny:sd3", "resolution": 72}, "72 is not a multiple of 16"),
        ({"model": "tiny:sd3", "anchor": "kl"}, "set anchor to l2"),
        ({"model": "tiny:sd15", "sampler": "own"}, "set sampler to ddim"),
    ],
)
def test_settings_that_cannot_work_or_have_no_effect(settings: Settings, given: dict[str, Any], message: str) -> None:
    trainer = DRaFTTrainer(DRaFTConfig(**settings(**given)), reward=brightness, held_out={})
    with pytest.raises(InputError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("given", "reward", "message"),
    [
        ({"omega": 0.5}, None, "omega 0.5 gives the direction no gradient"),
        ({"direction": "none.safetensors"}, None, "cannot be read"),
        ({}, brightness, "sees image and prompt as two vectors"),
    ],
)
def test_d2_refuses_before_the_model_is_loaded(
    settings: Settings,
    bundled: Encoder,
    given: dict[str, Any],
    reward: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(D2AlignTrainer, "load_pipeline", lambda self: pytest.fail("the model was loaded"))
    config = D2AlignConfig(**settings(gradient_steps="one", **given))
    with pytest.raises(InputError, match=message):
        D2AlignTrainer(config, reward=reward or CosineReward(bundled), held_out={}).train()


def test_models_of_edm_are_refused(settings: Settings) -> None:
    pipeline: Any = tiny_pipeline("sdxl")
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(InputError, match="EDM's kind"):
        trained(DRaFTConfig(**settings()), pipeline=pipeline)


def test_another_reward_or_another_probe_is_no_resumption(settings: Settings, tmp_path: Path) -> None:
    own = tmp_path / "held.txt"
    own.write_text("a whale\n", encoding="utf-8")
    given = settings(probe_size=1, probe_images=1, held_out_prompts=own)
    trained(DRaFTConfig(**given), held_out={"dark": dark})
    given["steps"] = 2

    def bright(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return brightness(images, prompts)

    bright.differentiable, bright.fingerprint = True, "another"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="the reward changed"):
        trained(DRaFTConfig(**given), held_out={"dark": dark}, reward=bright)
    with pytest.raises(InputError, match="the held-out reward changed"):
        trained(DRaFTConfig(**given), held_out={"darker": dark})
    own.write_text("a shark\n", encoding="utf-8")
    with pytest.raises(InputError, match="the probe's prompts changed"):
        trained(DRaFTConfig(**given), held_out={"dark": dark})
    own.write_text("a whale\n", encoding="utf-8")
    assert trained(DRaFTConfig(**given), held_out={"dark": dark})[1].step == 2


def test_odd_prompts_and_judges(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, empty = tmp_path / "one.txt", tmp_path / "empty.txt"
    one.write_text("a dog " * 90 + "\n", encoding="utf-8")
    empty.write_text("\n", encoding="utf-8")
    _, report = trained(DRaFTConfig(**settings("one", data=one, probe_size=4)), held_out={"dark": dark})
    assert report.first_look == {}
    assert "1 prompts have more than 77 tokens" in report.warnings[0]
    with pytest.raises(InputError, match="holds no prompt"):
        trained(DRaFTConfig(**settings(held_out_prompts=empty, probe_size=1)))
    with pytest.raises(InputError, match="named 'reward'"):
        trained(DRaFTConfig(**settings(probe_size=1)), held_out={"reward": dark})
    both = WeightedSum({"a": (1.0, brightness), "b": (2.0, brightness)})
    trainer = DRaFTTrainer(DRaFTConfig(**settings("sum", held_out_reward=["redness"])), reward=both)
    trainer.train()  # redness is none of the terms
    config = DRaFTConfig(**settings("in-sum", reward=["redness=2", "cosine:bundled"], held_out_reward=["redness"]))
    with pytest.raises(InputError, match="the one that is trained on"):
        DRaFTTrainer(config).train()
