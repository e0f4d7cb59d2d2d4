"""GRPO: what is trained is what was drawn, what is learnt, and how parts combine; on tiny models with real blocks."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from generation import GRPOConfig, GRPOTrainer, tiny_pipeline
from generation.noise_levels import ddim_like
from generation.objectives.branch_tree import grow_tree
from generation.objectives.noise_windows import draw_noise_window
from generation.rewards import Reward, WeightedSum, as_reward
from generation.rollouts import Policy
from generation.stochastic_steps import stochastic_steps
from generation.training.randomness import stream
from mmalign.errors import InputError, ModelUnavailableError

PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "small") for thing in ("dog", "boat", "cup", "tree")]


def left(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
    """How much brighter the left half is."""
    stacked = torch.stack(list(images))
    half = stacked.shape[-1] // 2
    return stacked[..., :half].mean(dim=(1, 2, 3)) - stacked[..., half:].mean(dim=(1, 2, 3))


def dark(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
    return [-float(image.mean()) for image in images]


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")

    def of(output: str = "run", **given: Any) -> dict[str, Any]:
        return {
            "data": prompts, "output": tmp_path / output, "model": "tiny:sd3", "resolution": 64, "device": "cpu",
            "sampling_steps": 4, "steps": 1, "group_size": 4, "batch_size": 4, "accumulation": 2, "updates": 1,
            "rank": 2, "learning_rate": 1e-2, "probe_every": 10, "checkpoint_every": 2, "probe_size": 0, **given,
        }  # fmt: skip

    return of


def train(given: dict[str, Any], reward: Any = left, kind: type[GRPOTrainer] = GRPOTrainer) -> Any:
    return kind(GRPOConfig(**given), reward=reward, held_out={"dark": dark}).train()


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "peak_memory_gb")} for row in rows]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export" / "pytorch_lora_weights.safetensors")


# -- what is trained is what was drawn ---------------------------------------------------------------------------------

SAMPLERS = [
    *((family, {"ratio": ratio}) for family in ("sdxl", "sd15", "sd3", "flux") for ratio in ("plain", "guard")),
    *((family, {"stochastic_sampler": kind}) for family in ("sd3", "flux") for kind in ("dance-sde", "cps")),
    *((family, {"rollout": "tree", "split_steps": "0,1", "batch_size": 2}) for family in ("sdxl", "sd3", "flux")),
    ("sdxl", {"guidance": 3.0}),
    ("sd3", {"stochastic_sampler": "cps", "ratio": "plain"}),
    ("sd3", {"noise_window": "random:2", "guidance": 3.0}),
    ("sd3", {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("family", "given"), SAMPLERS)
def test_the_ratio_is_one_until_the_weights_change(settings: Any, family: str, given: dict[str, Any]) -> None:
    more: dict[str, Any] = {"accumulation": 4} if "rollout" in given else {}
    more |= {"guidance": 3.5} if family == "flux" else {}
    report = train(settings(model=f"tiny:{family}", **given, **more))
    assert (report.values["ratio_mean"], report.values["ratio_std"]) == (1.0, 0.0)
    assert report.values["ratio_error"] == 0.0
    assert report.values["grad_norm"] > 0
    assert report.warnings == []


def test_it_is_not_after_the_first_update(settings: Any) -> None:
    report = train(settings(updates=2, clip_range=1.0))
    assert report.values["ratio_error"] == 0.0
    assert report.values["ratio_std"] > 0


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_without_noise_it_draws_what_the_pipeline_draws(family: str) -> None:
    pipeline = tiny_pipeline(family)
    if family == "sdxl":
        pipeline.scheduler = ddim_like(pipeline.scheduler)
    kind: Any = "ddim" if family == "sdxl" else "flow-sde"

    def call(roots: Sequence[int]) -> dict[str, Any]:
        return {
            "prompt": [PROMPTS[root] for root in roots], "num_inference_steps": 4, "height": 64, "width": 64,
            "generator": [torch.Generator().manual_seed(root) for root in roots], "guidance_scale": 2.0,
        }  # fmt: skip

    wanted = pipeline(**call(range(3)), output_type="latent").images
    policy = Policy(
        pipeline,
        lambda scheduler: stochastic_steps(scheduler, kind, level=0.0),
        lambda *_: torch.full((1,), torch.nan),
        grow_tree(4, ()),
    )
    drawn = policy.draw(call, 3, size=2, kept=range(4))
    torch.testing.assert_close(drawn.latents, wanted, rtol=1e-4, atol=1e-4)
    assert drawn.denoiser_calls == 12
    assert drawn.steps == []  # nothing random, so nothing to train


def test_gradients_are_those_of_a_loop_by_hand(settings: Any) -> None:
    """Flow-GRPO written out for one batch of a rectified flow, from the network and the formulas of the paper."""
    trainer = GRPOTrainer(GRPOConfig(**settings(ratio="plain", step_weight="none", accumulation=1, advantage="dance")))
    trainer._given, trainer._given_held_out = left, {}
    found: dict[str, Any] = {}

    class Learner:
        def step(self, items: Any, loss: Any) -> dict[str, float]:
            network = trainer.learner.adaptation.network
            parameters = [p for p in network.parameters() if p.requires_grad]
            total = sum(loss(item)[0] for item in items) / len(items)
            found["gradient"] = torch.autograd.grad(total, parameters)
            found["items"], found["parameters"], found["network"] = list(items), parameters, network
            return {}

    original = GRPOTrainer._step

    def spied(self: Any, items: Any) -> Any:
        learner = self.learner
        try:
            self.learner = Learner()
            self.learner.adaptation = learner.adaptation
            return original(self, items)
        finally:
            self.learner = learner

    trainer._step = spied.__get__(trainer)  # type: ignore[method-assign]
    # away from the start, where half of a LoRA's gradient is zero
    attach = trainer.attach

    def moved(pipeline: Any) -> None:
        attach(pipeline)
        for number, p in enumerate(trainer.learner.adaptation.parameters):
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))

    trainer.attach = moved  # type: ignore[method-assign]
    trainer.train()

    network, items = found["network"], found["items"]
    scheduler = trainer.sampler.scheduler
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas.double()
    images, level, total = 4, 0.7, torch.zeros(())
    scores = None
    for item in items:
        step, rows = item.step, range(images)
        embeds = torch.stack([item.batch.embeddings[row]["prompt_embeds"] for row in rows]).float()
        pooled = torch.stack([item.batch.embeddings[row]["pooled_prompt_embeds"] for row in rows]).float()
        time = scheduler.timesteps[step.number].expand(images)
        v = network(
            hidden_states=step.latents, timestep=time, encoder_hidden_states=embeds, pooled_projections=pooled,
            return_dict=False,
        )[0]  # fmt: skip
        s, following = sigmas[step.number], sigmas[step.number + 1]
        star = sigmas[1] if s == 1 else s
        sigma_t, dt = level * (s / (1 - star)).sqrt(), s - following
        mean = step.latents * (1 - sigma_t**2 / (2 * s) * dt) - v * (1 + sigma_t**2 * (1 - s) / (2 * s)) * dt
        std = sigma_t * dt.sqrt()
        log_prob = (-((step.samples - mean) ** 2) / (2 * std**2)).flatten(1).mean(dim=1)
        ratio = (log_prob - log_prob.detach()).exp()
        total = total - (item.advantages * ratio).mean() / len(items)
        scores = item.advantages
    assert len(items) == 3  # all but the last step
    torch.testing.assert_close(scores.mean(), torch.zeros((), dtype=scores.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.std(), torch.ones((), dtype=scores.dtype), atol=1e-4, rtol=0)
    for mine, theirs in zip(found["gradient"], torch.autograd.grad(total, found["parameters"]), strict=True):
        torch.testing.assert_close(mine, theirs.to(mine), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        {"ratio": "plain", "step_weight": "none"},
        {"ratio": "guard", "step_weight": "guard"},
        {"ratio": "guard", "step_weight": "guard", "normalize_weights": True, "clip_range": 1e-3},
        {"ratio": "plain", "step_weight": "std", "kl_weight": 0.5, "kl_form": "released"},
        {"ratio": "plain", "step_weight": "none", "kl_weight": 0.5, "kl_form": "exact"},
    ],
)
def test_the_loss_is_what_the_settings_say(settings: Any, given: dict[str, Any]) -> None:
    """Written out for weights that have moved since the rollout, from its noise, with the sigmas of the scheduler."""
    checked: list[int] = []

    class Spied(GRPOTrainer):
        def _step(self, items: Any) -> Any:
            values = super()._step(items)
            sigmas, config = self.sampler.scheduler.sigmas.double(), self.config
            lengths = [float(sigmas[i] - sigmas[i + 1]) for i in range(3)]
            for item in items:
                step = item.step
                call = self._call(item.batch, step.roots)
                mean, old = self._drawing.mean(call, step)[0].detach().double(), step.mean.double()
                s = float(sigmas[step.number])
                sigma_t = 0.7 * (s / (1 - (float(sigmas[1]) if s == 1 else s))) ** 0.5
                std = sigma_t * lengths[step.number] ** 0.5
                z = (step.samples.double() - old) / std
                first = ((mean - old) * z).flatten(1).mean(dim=1)
                squares = (mean - old).square().flatten(1).mean(dim=1)
                log_ratio = first if config.ratio == "guard" else first / std - squares / (2 * std**2)
                weights = {"none": [1.0] * 3, "guard": [1 / d for d in lengths], "std": None}[config.step_weight]
                weight = std if weights is None else weights[step.number]
                if config.normalize_weights:
                    weight *= 3 / sum(1 / d for d in lengths)
                clip = config.clip_range or (2e-6 if config.ratio == "guard" else 1e-4)
                clip *= (65536 / mean[0].numel()) ** 0.5
                ratio, worth = log_ratio.exp(), item.advantages
                losses = -weight * torch.minimum(worth * ratio, worth * ratio.clamp(1 - clip, 1 + clip))
                if config.kl_weight:
                    base = self._drawing.mean(call, step, self.reference)[0].double()
                    spread = sigma_t if config.kl_form == "released" else std
                    losses = losses + 0.5 * (mean - base).square().flatten(1).mean(dim=1) / (2 * spread**2)
                loss = float(self.loss(item)[0].detach()) / item.share
                assert loss == pytest.approx(float(losses.sum()), rel=1e-4, abs=1e-5)
                checked.append(step.number)
            return values

    train(settings(**{"accumulation": 1, "learning_rate": 1e-2, **given}), kind=Spied)
    assert checked == [0, 1, 2]


def items_of(given: dict[str, Any], reward: Any) -> tuple[list[Any], GRPOTrainer]:
    """What is trained on in the first step."""
    found: list[Any] = []

    class Spied(GRPOTrainer):
        def _step(self, items: Any) -> Any:
            found.extend(items)
            return super()._step(items)

    trainer = Spied(GRPOConfig(**given), reward=reward, held_out={})
    trainer.train()
    return found, trainer


def test_advantages_are_what_the_settings_say(settings: Any) -> None:
    rewards = [0.0, 0.0, 0.0, 1.0, 0.0, 0.1, 0.2, 0.3]
    given: Iterator[float] = iter(())

    def scored(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        return [next(given) for _ in images]

    given = iter(rewards)
    items, _ = items_of(settings("global", advantage="global-std"), scored)
    both = torch.cat([item.advantages for item in items if item.step.number == 0])
    groups = torch.tensor(rewards, dtype=torch.float64).view(2, 4)
    wanted = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(correction=0) + 1e-4)
    torch.testing.assert_close(both.view(2, 4), wanted)

    given = iter([0.0] * 4 + [1.0] + [0.0] * 4 + [1e-6])
    items, _ = items_of(settings("median", advantage="median", group_size=5, batch_size=5), scored)
    first, second = (item.advantages for item in items if item.step.number == 0)
    assert first.tolist() == [0.0] * 4 + [5.0]  # a deviation of 0 is floored, and the rest clamped
    assert second[4] == pytest.approx(1e-6 / 1e-3, rel=1e-3)


def test_a_tree_is_fused_and_pruned_as_the_settings_say(settings: Any) -> None:
    tree: dict[str, Any] = {"rollout": "tree", "split_steps": "0,1", "accumulation": 1, "sampling_steps": 6}
    found: dict[str, dict[int, Any]] = {}
    for name, given in {"path": {}, "mean": {"fusion": 0.0}, "pruned": {"pruning": "best"}}.items():
        items, _ = items_of(settings(name, **tree, **given), left)
        found[name] = {item.step.number: item for item in items}
    # Two leaves below each of the first nodes: their mean, or what the density says.
    assert not torch.equal(found["mean"][0].advantages, found["path"][0].advantages)
    torch.testing.assert_close(
        found["mean"][0].advantages.abs(), torch.full((2,), 0.5**0.5, dtype=torch.float64), rtol=1e-4, atol=0
    )
    # Of the four edges of each branch after the last split half are trained, the earlier of equal ones.
    for name, wanted in {"path": [2, 4, 4, 4, 4], "pruned": [2, 4, 4, 4, 0]}.items():
        assert [float(found[name][number].kept.sum()) for number in range(5)] == wanted


def test_a_tree_shares_its_beginning_and_costs_less(settings: Any) -> None:
    seen: dict[str, Any] = {}

    class Spied(GRPOTrainer):
        def _draw(self, policy: Any, batch: Any, kept: Any) -> Any:
            seen.setdefault(policy.tree.leaves.numel(), []).append(super()._draw(policy, batch, kept))
            return seen[policy.tree.leaves.numel()][-1]

    common = {"sampling_steps": 8, "group_size": 8, "batch_size": 4, "accumulation": 4}
    alone = train(settings("alone", **common), kind=Spied).values
    tree = train(settings("tree", **common, rollout="tree", split_steps="0,2,4"), kind=Spied).values
    assert alone["denoiser_calls"] == 16 * 8
    assert tree["denoiser_calls"] == 2 * (1 + 2 * 2 + 4 * 2 + 8 * 3)
    assert tree["denoiser_calls"] < 0.7 * alone["denoiser_calls"]
    rollout = seen[8][0]
    assert len(rollout.latents) == 8
    assert len({tuple(one.flatten().tolist()) for one in rollout.latents}) == 8
    steps = {number: [step for step in rollout.steps if step.number == number] for number in range(7)}
    assert [sum(len(step.latents) for step in steps[number]) for number in range(7)] == [1, 2, 2, 4, 4, 8, 8]
    assert [sum(len(step.samples) for step in steps[number]) for number in range(7)] == [2, 2, 4, 4, 8, 8, 8]
    # What a step came to is what the next one begins with.
    for number in range(6):
        came = torch.cat([step.samples for step in steps[number]])
        torch.testing.assert_close(torch.cat([step.latents for step in steps[number + 1]]), came, rtol=0, atol=0)
    # Siblings' noise is alike by 1 / (1 + 4^2) and each has variance 1: the density that is divided by is theirs.
    step = steps[0][0]
    noise = (step.samples - step.mean[step.parents]).flatten(1)
    assert float((noise[0] - noise[1]).std() / noise.std()) == pytest.approx((2 * 16 / 17) ** 0.5, abs=0.1)


def test_a_group_may_start_from_the_same_noise(settings: Any) -> None:
    firsts: dict[str, Tensor] = {}

    class Spied(GRPOTrainer):
        def _draw(self, policy: Any, batch: Any, kept: Any) -> Any:
            rollout = super()._draw(policy, batch, kept)
            firsts.setdefault(self.config.initial_noise, rollout.steps[0].latents)
            return rollout

    for of in ("image", "group"):
        train(settings(of, initial_noise=of), kind=Spied)
    assert all(torch.equal(firsts["group"][0], other) for other in firsts["group"][1:])
    assert not torch.equal(firsts["image"][0], firsts["image"][1])


# -- what is learnt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("sdxl", {"preset": "flow-grpo", "group_size": 4}),
        ("sd15", {"preset": "grpo-guard"}),
        ("flux", {"preset": "grpo-guard,mc-grpo", "group_size": 5, "batch_size": 5}),
        ("sd3", {"stochastic_sampler": "cps", "ratio": "plain"}),
        ("sd3", {"preset": "dance-grpo", "group_size": 4}),
        ("sd3", {"trust": "kl-mask"}),
        ("sdxl", {"rollout": "tree", "split_steps": "0,1", "pruning": "extremes"}),
    ],
)
def test_an_update_makes_what_was_better_likelier(settings: Any, family: str, given: dict[str, Any]) -> None:
    gained: list[float] = []

    class Spied(GRPOTrainer):
        def _step(self, items: Any) -> Any:
            values = super()._step(items)
            before, self._ratios = self._ratios, {}
            with torch.no_grad():
                for item in items:
                    self.loss(item)
            ratios = [ratio for number in sorted(self._ratios) for ratio in self._ratios[number]]
            worth = [item.advantages * item.kept for item in sorted(items, key=lambda item: item.step.number)]
            gained.append(float(sum((w * (r - 1)).sum() for w, r in zip(worth, ratios, strict=True))))
            self._ratios = before
            return values

    train(settings(model=f"tiny:{family}", **{**given, "learning_rate": 1e-4}), kind=Spied)
    assert gained[0] > 0


@pytest.mark.slow
def test_the_reward_rises_on_held_out_prompts_too(settings: Any, tmp_path: Path) -> None:
    def bright(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        return [float(image.mean()) for image in images]

    given = settings(
        adaptation="full", learning_rate=1e-2, steps=40, group_size=8, batch_size=8, accumulation=4, updates=2,
        clip_range=0.1, probe_size=3, probe_every=10, probe_sampling_steps=4, checkpoint_every=50,
    )  # fmt: skip
    report = train(given, reward=bright)
    start, end = report.first_look, report.values
    assert end["probe_reward"] > start["probe_reward"] + start["probe_reward_std"]
    for name in ("ratio_mean_0", "ratio_std_0", "clipped_high", "clipped_low", "group_std", "probe_dark"):
        assert name in end, name


def test_equal_rewards_teach_nothing(settings: Any, tmp_path: Path) -> None:
    report = train(settings(), reward=lambda images, prompts: [1.0] * len(images))
    assert "nothing was learnt" in report.warnings[0]
    assert report.values["equal_groups"] == 1
    assert all(value.abs().max() == 0 for name, value in adapter(tmp_path / "run").items() if "lora_B" in name)


def test_the_median_image_trains_nothing(settings: Any) -> None:
    items: list[Any] = []

    class Spied(GRPOTrainer):
        def _step(self, chosen: Any) -> Any:
            items.extend(chosen)
            return super()._step(chosen)

    train(settings(advantage="median", group_size=5, batch_size=5), kind=Spied)
    assert {float(item.kept.sum()) for item in items} == {4.0}
    for item in items:
        assert item.advantages[item.kept == 0].tolist() == [0.0]
        assert sorted((item.advantages > 0).tolist()) == [False] * 3 + [True] * 2


def test_several_rewards_may_be_compared_each_by_itself(settings: Any) -> None:
    """A reward of tiny units counts as much as another where advantages are added, and not where rewards are."""
    found: dict[str, list[Any]] = {}

    class Spied(GRPOTrainer):
        def _step(self, chosen: Any) -> Any:
            found.setdefault(self.config.aggregate, []).extend(chosen)
            return super()._step(chosen)

    def small(images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return -1e-6 * left(images, prompts)

    for aggregate in ("rewards", "advantages"):
        both = WeightedSum({"left": (1.0, as_reward(left)), "small": (1.0, as_reward(small))})
        train(settings(aggregate, aggregate=aggregate), reward=both, kind=Spied)
    assert max(float(item.advantages.abs().max()) for item in found["rewards"]) > 0.5
    # 1e-4 is added to the deviation, so that of the small reward is not scaled to 1
    assert max(float(item.advantages.abs().max()) for item in found["advantages"]) > 0.5
    for name in found:
        row = logged(settings(name)["output"])[-1]
        assert row["reward"] == pytest.approx(row["reward_left"] + row["reward_small"], rel=1e-4)


def test_the_anchor_holds(settings: Any) -> None:
    """The divergence of the weights that drew from those before training: zero at first, and then not."""
    report = train(settings(steps=3, kl_weight=0.1))
    rows = logged(settings()["output"])
    assert rows[0]["kl"] == 0
    assert report.values["kl"] > 0


# -- runs --------------------------------------------------------------------------------------------------------------


class Interrupted(GRPOTrainer):
    at: int | None = None

    def update(self, batches: Any) -> dict[str, float]:
        if self.step == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().update(batches)


@pytest.mark.parametrize("given", [{}, {"rollout": "tree", "split_steps": "0,1", "accumulation": 4}])
def test_an_interrupted_run_ends_as_the_undisturbed_one(settings: Any, tmp_path: Path, given: dict[str, Any]) -> None:
    def trainer(output: str) -> Interrupted:
        more = {"steps": 4, "updates": 2, "train_share": 0.6, "lr_schedule": "cosine", **given}
        if not given:
            more["noise_window"] = "slide:2:2"
        return Interrupted(GRPOConfig(**settings(output, **more)), reward=left, held_out={"dark": dark})

    trainer("whole").train()
    stopped = trainer("stopped")
    stopped.at = 1
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert trainer("stopped").train().resumed_from == 2
    whole, again = adapter(tmp_path / "whole"), adapter(tmp_path / "stopped")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "stopped")


def test_a_reward_server_that_dies_costs_no_finished_step(settings: Any, tmp_path: Path) -> None:
    calls: list[int] = []

    class Server(Reward):
        name = fingerprint = "server"

        def score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
            calls.append(len(images))
            if len(calls) == 4:
                raise ModelUnavailableError("reward server cannot be reached; start it")
            return left(images, prompts)

    given: dict[str, Any] = {"steps": 3, "checkpoint_every": 50}  # two batches a step are scored
    with pytest.raises(ModelUnavailableError):
        train(settings("died", **given), reward=Server())
    report = train(settings("died", **given), reward=Server())
    assert report.resumed_from == 1
    train(settings("whole", **given), reward=left)
    whole, again = adapter(tmp_path / "whole"), adapter(tmp_path / "died")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_size": 3}, "8 images a step .* no whole number of groups of 3"),
        ({"updates": 3}, "3 updates cannot share 2 batches"),
        ({"advantage": "median"}, "group_size 4 has no middle"),
        ({"rollout": "tree", "split_steps": "0"}, "group_size 4 is not the 2 leaves"),
        ({"rollout": "tree", "split_steps": "0,3"}, "not all among the steps 0 to 2"),
        ({"rollout": "tree", "split_steps": "0,x"}, "'0,x' are no numbers"),
        ({"rollout": "tree", "split_steps": "0,1", "advantage": "global-std"}, "'global-std' is not of trees"),
        ({"noise_window": "random:9"}, "9 steps do not fit"),
        ({"noise_window": "sometimes"}, "'sometimes' is not known"),
        ({"noise_window": "random:²"}, "is not known"),
        ({"group_size": 3, "dry_run": True}, "8 images a step .* no whole number of groups of 3"),
        ({"eta": 0.5}, "set stochastic_sampler and noise_level"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"stochastic_sampler": "ddim"}, "ddim is not for this model; set it to flow-sde"),
        ({"model": "tiny:sdxl", "stochastic_sampler": "cps"}, "cps is not for this model; set it to ddim"),
        ({"stochastic_sampler": "cps", "noise_level": 1.5}, "noise_level 1.5 is above 1"),
    ],
)
def test_what_cannot_work_is_refused(settings: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(settings(**given))


def test_presets_combine_and_ones_own_settings_win() -> None:
    for method in (None, "flow-grpo", "grpo-guard", "mc-grpo", "branch-grpo", "dance-grpo"):
        for card in (None, "24gb", "48gb", "80gb"):
            names = [name for name in (method, card) if name]
            for order in (names, names[::-1]):
                GRPOConfig(**({"preset": ",".join(order)} if order else {})).check_groups(1)
    config = GRPOConfig(preset="flow-grpo,mc-grpo,24gb", learning_rate=7.0)
    assert (config.ratio, config.advantage, config.batch_size, config.learning_rate) == ("plain", "median", 2, 7.0)
    assert GRPOConfig(preset="grpo-guard").kl_weight == 0
    with pytest.raises(InputError, match="'nonsense' is not known"):
        GRPOConfig(preset="grpo-guard,nonsense")


def test_windows_of_noise() -> None:
    def drawn(form: str, rollout: int = 0) -> list[int]:
        return list(draw_noise_window(form, 10, rollout, stream(0, "window", rollout)))

    assert drawn("all") == list(range(9))
    starts = {drawn("random:3:2:8", rollout)[0] for rollout in range(60)}
    assert starts == {2, 3, 4, 5}
    assert {drawn("random:2", rollout)[-1] for rollout in range(60)} == {1, 2, 3, 4}  # the first half
    assert [drawn("slide:4:25", rollout)[0] for rollout in (0, 24, 25, 149, 150)] == [0, 0, 1, 5, 0]


def test_a_dry_run_from_the_command_line(command_line: Callable[..., Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    options = ["--preset", "branch-grpo,80gb", "--reward", "redness", "--held-out-reward", "jpeg-incompressibility"]
    result = command_line("train", "grpo", prompts, tmp_path / "run", *options, "--dry-run", "-q")
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "dry-run" / "export" / "pytorch_lora_weights.safetensors").is_file()
