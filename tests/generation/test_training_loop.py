"""The loop under a trainer that has nothing of preference pairs: prompts only, two optimiser steps a step."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from generation.tiny import tiny_pipeline
from generation.training import Trainer, TrainingConfig, TrainingReport
from generation.training.feed import load_batches
from generation.training.randomness import stream
from generation.training.trainer import Prepared
from mmalign.errors import InputError, NonFiniteLossError

PROMPTS = ["a dog", "a red bus", "two cats", "snow"]


@dataclass(frozen=True)
class PromptBatch:
    prompts: list[str]
    noise: torch.Tensor

    def to(self, device: torch.device) -> PromptBatch:
        return PromptBatch(self.prompts, self.noise.to(device))

    def labels(self) -> dict[str, list[str]]:
        return {"": self.prompts}


class PromptData:
    def __init__(self, prompts: list[str], seed: int, threaded: bool = True) -> None:
        self.prompts, self.seed, self.threaded = prompts, seed, threaded
        self.fingerprint = json.dumps(prompts)

    def batch(self, number: int) -> PromptBatch:
        prompts = [self.prompts[(2 * number + i) % len(self.prompts)] for i in range(2)]
        return PromptBatch(prompts, torch.randn(2, 4, 8, 8, generator=stream(self.seed, "start", number)))


class PromptTrainer(Trainer):
    """Draws latents to nothing: a reward for darkness. Two optimiser steps over the same batches, as in GRPO."""

    families = ("sd15",)
    prompts = PROMPTS
    interrupt_at: int | None = None

    def prepare(self) -> Prepared:
        self.pipeline = self.load_pipeline()
        return Prepared(self.pipeline, PromptData(self.prompts, self.config.seed), left_out=3)

    def connect(self, pipeline: Any) -> None:
        with torch.no_grad():
            encoded = [pipeline.encode_prompt(p, "cpu", 1, False)[0][0] for p in self.prompts]
        self.embeddings = dict(zip(self.prompts, encoded, strict=True))

    def loss(self, batch: PromptBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        text = torch.stack([self.embeddings[prompt] for prompt in batch.prompts])
        drawn = self.learner.network(batch.noise, torch.tensor(500), encoder_hidden_states=text).sample
        errors = drawn.square().flatten(1).mean(1)
        return errors.mean(), {"brightness": errors.detach()}

    def update(self, batches: Any) -> dict[str, float]:
        if self.step == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        first = self.learner.step(batches, self.loss)
        return self.learner.step(batches[:1], self.loss) | {"loss_before": first["loss"]}

    @property
    def total_updates(self) -> int:
        return 2 * self.config.steps

    def look(self) -> dict[str, float]:
        batch = PromptData(self.prompts, 99).batch(0)
        return {"held_out": float(self.loss(batch)[0])}

    def judge(self, start: Any, values: Any) -> dict[str, str]:
        return {"moved": "it moved"} if values["held_out"] != start["held_out"] else {}


Run = Callable[..., TrainingReport]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def go(output: str, kind: type[Trainer] = PromptTrainer, **settings: Any) -> TrainingReport:
        given = {"model": "tiny:sd15", "steps": 4, "accumulation": 2, "rank": 4, "learning_rate": 1e-3, "device": "cpu"}
        given |= {"checkpoint_every": 2, "probe_every": 1, "output": tmp_path / output, "lora_dropout": 0.2}
        return kind(TrainingConfig(**(given | settings))).train()

    return go


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "peak_memory_gb")} for row in rows]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "pytorch_lora_weights.safetensors")


def test_prompts_alone_are_trained_on_and_an_interrupted_run_ends_as_the_undisturbed_one(
    run: Run, tmp_path: Path, curves: None
) -> None:
    schedule = {"lr_schedule": "linear", "ema_decay": 0.5}
    report = run("whole", **schedule)
    rows = logged(tmp_path / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["held_out"] < rows[0]["held_out"]
    assert rows[1]["loss_before"] != rows[1]["loss"]
    assert report.left_out == 3
    assert (tmp_path / "whole" / "curves.png").is_file()
    # eight optimiser steps: the last of four steps logs the eighth's rate
    assert [row["learning_rate"] for row in rows[1:]] == pytest.approx([1e-3 * (1 - n / 8) for n in (1, 3, 5, 7)])

    class Interrupted(PromptTrainer):
        interrupt_at = 2

    with pytest.raises(KeyboardInterrupt):
        run("broken", Interrupted, **schedule)
    assert run("broken", **schedule).resumed_from == 3
    assert logged(tmp_path / "broken") == rows
    one, other = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_warning_is_given_once_in_a_run_however_often_it_is_resumed(run: Run) -> None:
    assert run("run", steps=2).warnings == ["step 1: it moved"]
    assert run("run", steps=4).warnings == []


def test_other_prompts_and_other_weights_do_not_continue_a_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fewer(PromptTrainer):
        prompts = PROMPTS[:2]

    class Nudged(PromptTrainer):
        def load_pipeline(self) -> Any:
            pipeline = super().load_pipeline()
            with torch.no_grad():
                pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1e-6
            return pipeline

    run("run", steps=2)
    with pytest.raises(InputError, match="the training data are not those that"):
        run("run", Fewer)
    with pytest.raises(InputError, match="the model's weights are not those that"):
        run("run", Nudged)
    assert run("run").resumed_from == 2


def test_a_family_that_a_method_cannot_train_is_refused_by_name(run: Run) -> None:
    with pytest.raises(InputError, match=r"'tiny:sdxl' is a sdxl pipeline; this method trains SD 1\.5$"):
        run("run", model="tiny:sdxl")


def test_a_bad_row_of_a_method_s_own_is_named(run: Run) -> None:
    class Poisoned(PromptTrainer):
        def loss(self, batch: PromptBatch) -> Any:
            loss, values = super().loss(batch)
            if "snow" in batch.prompts:
                values["brightness"][batch.prompts.index("snow")] = float("nan")
            return loss, values

    with pytest.raises(NonFiniteLossError, match=r"brightness is not finite; rows: snow\. "):
        run("run", Poisoned, probe_every=100)


def test_what_is_trained_and_with_what_is_written_down(run: Run, tmp_path: Path) -> None:
    run("named", steps=1)
    pipeline = tiny_pipeline("sd15")
    config = TrainingConfig(output=tmp_path / "given", steps=1, rank=4, device="cpu")
    PromptTrainer(config, pipeline=pipeline).train()
    notes = []
    for name in ("named", "given"):
        about = json.loads((tmp_path / name / "run.json").read_text())
        assert {"mmalign", "torch", "diffusers"} <= set(about["libraries"])
        assert (about["seed"], about["written"][-1]) == (0, "Z")
        with safe_open(tmp_path / name / "export" / "pytorch_lora_weights.safetensors", "pt") as file:
            notes.append(file.metadata())
        assert notes[-1]["mmalign_base"] == about["base"]
        assert notes[-1]["mmalign_base_weights"] == about["base_weights"]
    assert notes[0]["mmalign_base"] == "tiny:sd15"
    assert "stable-diffusion-xl" not in notes[1]["mmalign_base"]  # config.model, which was not used
    assert notes[0]["mmalign_base_weights"] == notes[1]["mmalign_base_weights"]  # the same random weights


def test_a_checkpoint_holds_the_adapter_once(run: Run, tmp_path: Path) -> None:
    run("run", steps=2)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "optimizer.pt",
        "pytorch_lora_weights.safetensors",
        "trainer.json",
    ]


def test_a_dry_run_stands_in_for_a_given_pipeline_and_says_so(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15")
    config = TrainingConfig(output=tmp_path / "run", dry_run=True, device="cpu")
    report = PromptTrainer(config, pipeline=pipeline).train()
    assert "tiny:sd15 stands in for the pipeline" in report.warnings[0]


def test_a_dry_run_says_which_settings_it_does_without(tmp_path: Path) -> None:
    small: dict[str, Any] = {"output": tmp_path / "run", "dry_run": True, "device": "cpu", "model": "tiny:sd15"}
    report = PromptTrainer(TrainingConfig(**small, rank=999, steps=3, vae="other/vae")).train()
    told = "dry run: no vae other/vae, rank 4 instead of 999, steps 4 instead of 3"
    assert [line for line in report.warnings if line.startswith("dry run")] == [told]
    assert not any(line.startswith("dry run") for line in PromptTrainer(TrainingConfig(**small)).train().warnings)


def test_settings_of_loading_are_refused_beside_a_pipeline() -> None:
    with pytest.raises(InputError, match="vae and variant say how to load"):
        PromptTrainer(TrainingConfig(vae="other/vae"), pipeline=tiny_pipeline("sd15"))


@pytest.mark.parametrize("threaded", [True, False])
def test_batches_come_in_order_and_failures_are_raised(threaded: bool) -> None:
    data = PromptData(PROMPTS, 0, threaded)
    loaded = list(load_batches(data, range(3, 9), ahead=4, workers=2))
    assert all(torch.equal(batch.noise, data.batch(n).noise) for n, batch in zip(range(3, 9), loaded, strict=True))

    class Broken(PromptData):
        def batch(self, number: int) -> PromptBatch:
            if number == 2:
                raise InputError("gone")
            return super().batch(number)

    with pytest.raises(InputError, match="gone"):
        list(load_batches(Broken(PROMPTS, 0, threaded), range(5), ahead=4, workers=2))


# --- the learner ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "accumulation"), [(3, 1), (3, 4), (1, 4), (4, 1)])
def test_any_number_of_parts_is_a_step_on_their_mean_loss(parts: int, accumulation: int, tmp_path: Path) -> None:
    def trainer(folder: str) -> PromptTrainer:
        config = TrainingConfig(output=tmp_path / folder, accumulation=accumulation, rank=4, device="cpu",
                                learning_rate=1e-2, max_grad_norm=1e-2)  # fmt: skip
        made = PromptTrainer(config)
        made.attach(tiny_pipeline("sd15"))
        return made

    batches = [PromptData(PROMPTS, 0).batch(n) for n in range(parts)]
    ours, theirs = trainer("a"), trainer("b")
    values = ours.learner.step(batches, ours.loss)
    assert ours.learner.updates == 1

    weights = [p for p in theirs.learner.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=1e-2)
    loss = sum(theirs.loss(batch)[0] for batch in batches) / parts
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(weights, 1e-2)
    assert norm > 1e-2  # so that a sum in place of the mean would not show in Adam's first step, but does here
    assert values["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-6)
    before = [weight.detach().clone() for weight in weights]
    optimizer.step()
    mine = [p for p in ours.learner.network.parameters() if p.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(before, mine, strict=True))
    for own, other in zip(mine, weights, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
