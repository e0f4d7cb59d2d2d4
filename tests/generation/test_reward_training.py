"""Trainers on rewards: what they raise, what they watch, and that a run stopped anywhere ends as an undisturbed one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from generation import generate
from generation.methods import (
    METHODS,
    AlignPropConfig,
    AlignPropTrainer,
    D2AlignConfig,
    D2AlignTrainer,
    DRaFTConfig,
    DRaFTTrainer,
    RewardGradientTrainer,
)
from generation.rewards import CosineReward, RewardDirection
from generation.training.reward_training import over_optimisation_warnings
from mmalign import Encoder
from mmalign.errors import InputError

PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "small") for thing in ("dog", "boat", "cup", "tree")]


class LeftBright:
    """How much brighter the left half is; its own gradient, and a note of what it was asked."""

    differentiable = True
    name = "left"
    fingerprint = "left bright"

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], float, float]] = []

    def __call__(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        stacked = torch.stack(list(images))
        self.seen.append((list(prompts), stacked.min().item(), stacked.max().item()))
        half = stacked.shape[-1] // 2
        return stacked[..., :half].mean(dim=(1, 2, 3)) - stacked[..., half:].mean(dim=(1, 2, 3))


def dark(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
    return [-float(image.mean()) for image in images]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    return file


@pytest.fixture
def settings(prompts: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def of(output: str = "run", **given: Any) -> dict[str, Any]:
        return {
            "data": prompts, "output": tmp_path / output, "model": "tiny:sdxl", "resolution": 64, "device": "cpu",
            "sampling_steps": 3, "guidance": 3.0, "steps": 4, "batch_size": 2, "accumulation": 1, "rank": 2,
            "learning_rate": 1e-2, "probe_every": 2, "checkpoint_every": 2, "probe_size": 2, "probe_images": 2,
            "gradient_steps": "last:1", **given,
        }  # fmt: skip

    return of


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "peak_memory_gb")} for row in rows]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export" / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_the_reward_rises_on_held_out_prompts_too(settings: Any, tmp_path: Path, family: str, curves: None) -> None:
    reward = LeftBright()
    given = settings(model=f"tiny:{family}", steps=16, batch_size=4, rank=8, probe_every=8, gradient_steps="uniform")
    given["learning_rate"] = 2e-2 if family == "sdxl" else 5e-2
    config = AlignPropConfig(**given)
    report = AlignPropTrainer(config, reward=reward, held_out={"dark": dark}).train()
    start, end = report.first_look, report.values
    assert end["probe_reward"] > start["probe_reward"] + 1.5 * start["probe_reward_std"]
    assert all(0 <= low <= high <= 1 for _, low, high in reward.seen)
    trained = {p for prompts, *_ in reward.seen if len(prompts) == 4 for p in prompts if prompts.count(p) == 1}
    probe = {p for prompts, *_ in reward.seen for p in prompts} - trained
    assert len(probe) == 1  # a tenth of twelve
    rows = logged(tmp_path / "run")
    assert [row["step"] for row in rows if "probe_reward" in row] == [0, 8, 16]
    assert {row["graded_steps"] for row in rows[1:]} == {1.0, 2.0, 3.0}
    for name in ("probe_dark", "probe_tonal_variation", "saturated", "reward", "grad_norm"):
        assert name in rows[-1], name
    with Image.open(tmp_path / "run" / "samples" / "probe-000016.png") as picture:
        assert picture.width > 2 * 128
    assert (tmp_path / "run" / "curves.png").is_file()

    # What was exported raises the reward by itself, in the unmodified pipeline.
    scores = {}
    for name, options in (("base", {}), ("trained", {"adapter": tmp_path / "run" / "export"})):
        images = generate(
            PROMPTS[:4], model=f"tiny:{family}", steps=3, guidance_scale=3.0, height=64, width=64, seed=5, **options
        )
        arrays = [torch.from_numpy(np.asarray(i.image).copy()).permute(2, 0, 1).float() / 255 for i in images]
        scores[name] = float(LeftBright()(arrays, PROMPTS[:4]).mean())
    assert scores["trained"] > scores["base"]


class Interrupted(DRaFTTrainer):
    at: int | None = None

    def update(self, batches: Any) -> dict[str, float]:
        if self.step == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().update(batches)


def test_an_interrupted_run_ends_as_the_undisturbed_one(settings: Any, tmp_path: Path) -> None:
    def trainer(output: str) -> Interrupted:
        config = DRaFTConfig(**settings(output, gradient_steps="uniform", anchor="l2", anchor_weight=0.1))
        return Interrupted(config, reward=LeftBright(), held_out={"dark": dark})

    trainer("whole").train()
    stopped = trainer("stopped")
    stopped.at = 2
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    report = trainer("stopped").train()
    assert report.resumed_from == 3
    whole, again = adapter(tmp_path / "whole"), adapter(tmp_path / "stopped")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "stopped")
    assert logged(tmp_path / "whole")[-1]["anchor"] > 0


def test_without_a_cache_the_run_is_the_same(settings: Any, tmp_path: Path) -> None:
    for name, cache in (("with", True), ("without", False)):
        config = DRaFTConfig(**settings(name, cache=cache, steps=2))
        DRaFTTrainer(config, reward=LeftBright(), held_out={}).train()
    assert (tmp_path / "cache" / "prompts").is_dir()
    assert logged(tmp_path / "with") == logged(tmp_path / "without")


@pytest.mark.parametrize("method", ["alignprop", "draft", "draft-lv", "refl", "direct-align"])
def test_every_method_steps_with_its_defaults_for_a_short_run(settings: Any, tmp_path: Path, method: str) -> None:
    kind: Any = METHODS[method]
    given = settings(steps=1, probe_size=0)
    del given["gradient_steps"]
    if method == "refl":
        given["gradient_steps"] = "one:2:2"
    report = kind(kind.config_class(**given), reward=LeftBright(), held_out={}).train()
    assert report.values["grad_norm"] > 0
    assert report.values["graded_steps"] in (1.0, 2.0, 3.0)
    ups = {name: value for name, value in adapter(tmp_path / "run").items() if "lora_B" in name}
    assert any(value.abs().max() > 0 for value in ups.values())


def test_d2_align_learns_a_direction_first_and_reads_it_again(
    settings: Any, tmp_path: Path, bundled: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = D2AlignTrainer.draw

    def counted(self: Any, prompts: Sequence[str], seeds: Any) -> Any:
        drawn.append(len(prompts))
        return draw(self, prompts, seeds)

    monkeypatch.setattr(D2AlignTrainer, "draw", counted)
    given = settings(steps=1, probe_size=0, direction_images=6, direction_steps=40, direction_lr=1e-3)
    del given["gradient_steps"]
    reward = CosineReward(bundled)
    trainer = D2AlignTrainer(D2AlignConfig(**given), reward=reward, held_out={"dark": dark})
    report = trainer.train()
    assert sum(drawn) == 6
    direction = RewardDirection.load(tmp_path / "run" / "direction.safetensors")
    assert 0 < direction.norm <= 40 * 1e-3 * bundled.dim**0.5
    assert direction.pairs == 6
    assert (tmp_path / "run" / "direction.png").is_file()
    assert report.values["grad_norm"] > 0
    # The reward that was trained is the corrected one.
    images = list(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    texts = direction.guide(reward.text_embeds(PROMPTS[:3]))
    wanted = (reward.image_embeds(images) * texts).sum(dim=1)
    np.testing.assert_allclose(trainer.reward(images, PROMPTS[:3]), wanted.detach().numpy(), rtol=1e-5)
    assert np.abs(trainer.reward(images, PROMPTS[:3]) - reward(images, PROMPTS[:3])).max() > 1e-4

    drawn.clear()  # another run beside it: the vectors come from the cache; the same run: the direction does
    for output, steps in (("other", 1), ("run", 2)):
        config = D2AlignConfig(**{**given, "output": tmp_path / output, "steps": steps})
        D2AlignTrainer(config, reward=CosineReward(bundled), held_out={"dark": dark}).train()
    assert drawn == []


def test_a_run_ends_where_the_held_out_reward_stays_below_its_best(settings: Any, tmp_path: Path) -> None:
    values = iter([0.0, 1.0, 0.5, 0.4, 0.9, 2.0, 3.0])

    def falling(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        return [next(values)] * len(images)

    config = DRaFTConfig(**settings(steps=8, probe_every=1, checkpoint_every=50, patience=2))
    report = DRaFTTrainer(config, reward=LeftBright(), held_out={"falling": falling}).train()
    assert report.step == 3  # best at step 1, two looks later it ends
    assert "best at step 1" in report.warnings[-1]
    assert str(tmp_path / "run" / "best") in str(report.ended)
    adapter_file = "pytorch_lora_weights.safetensors"
    kept, last = (load_file(tmp_path / "run" / place / adapter_file) for place in ("best", "export"))
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    again = DRaFTTrainer(config, reward=LeftBright(), held_out={"falling": falling}).train()
    assert again.step == 3
    assert again.values["probe_held_out"] == pytest.approx(0.4)


def test_warnings_of_a_reward_that_is_exploited() -> None:
    start = {
        "probe_reward": 1.0, "probe_reward_std": 0.2, "probe_other": 5.0, "probe_other_std": 1.0,
        "probe_within_prompt_similarity": 0.6, "probe_tonal_variation": 0.5,
    }  # fmt: skip

    def kinds(**now: float) -> set[str]:
        return set(over_optimisation_warnings(start, {**start, **now}, ["other"]))

    assert kinds() == set()
    assert kinds(probe_reward=2.0) == set()
    assert kinds(probe_other=4.0) == set()  # the trained one has not risen
    assert kinds(probe_reward=2.0, probe_other=4.0) == {"held-out other"}
    assert kinds(probe_reward=2.0, probe_other=4.8) == set()
    assert kinds(probe_reward=2.0, probe_within_prompt_similarity=0.7) == {"probe_within_prompt_similarity"}
    assert kinds(probe_reward=2.0, probe_tonal_variation=0.3) == {"probe_tonal_variation"}
    assert kinds(probe_reward=1.05, probe_tonal_variation=0.3, probe_other=0.0) == set()


@pytest.mark.parametrize(
    ("given", "reward", "message"),
    [
        ({}, dark, "has no gradient"),
        ({}, None, "no reward given"),
        ({"gradient_steps": "last:4"}, LeftBright(), "needs 4 steps and a run has 3"),
        ({"loss": "hinge"}, LeftBright(), "needs a threshold"),
        ({"reward_threshold": 1.0}, LeftBright(), "loss negative has none"),
        ({"lora_dropout": 0.1}, LeftBright(), "lora_dropout"),
        ({"model": "tiny:sd3", "eta": 0.5}, LeftBright(), "eta 0.5 is of DDIM"),
        ({"held_out_reward": ["nonsense"]}, LeftBright(), "nonsense"),
    ],
)
def test_what_cannot_work_is_refused(settings: Any, given: dict[str, Any], reward: Any, message: str) -> None:
    held_out = None if "held_out_reward" in given else {}
    trainer = DRaFTTrainer(DRaFTConfig(**settings(**given)), reward=reward, held_out=held_out)
    with pytest.raises(InputError, match=message):
        trainer.train()


def test_a_reward_that_loses_the_graph_is_named(settings: Any) -> None:
    def detached(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return torch.stack([image.detach().mean() for image in images])

    detached.differentiable = True  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"'detached' gave .* without gradient"):
        DRaFTTrainer(DRaFTConfig(**settings()), reward=detached, held_out={}).train()


def test_prompts_of_the_probe_are_never_trained_on(settings: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "a red dog"}\n{"caption": "a whale"}\n', encoding="utf-8")
    for given in ({}, {"held_out_prompts": own}):
        trainer = RewardGradientTrainer(DRaFTConfig(**settings(**given)))
        trained, held_out = trainer._split_prompts()
        assert trained
        assert held_out
        assert not set(trained) & set(held_out)
        assert held_out == (["a red dog", "a whale"] if given else held_out)
        assert set(trained) | set(held_out) >= set(PROMPTS)
