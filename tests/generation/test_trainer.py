"""The trainer on the tiny SDXL and real photographs: what it learns, saves, resumes, exports and refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from generation.methods import (
    METHODS,
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    RewardWeightedConfig,
    RewardWeightedTrainer,
    SupervisedConfig,
    SupervisedTrainer,
)
from generation.pipelines import load_pipeline
from generation.tiny import tiny_pipeline
from generation.training.denoising import DenoisingTrainer
from generation.training.trainer import Trainer, TrainingReport
from mmalign.errors import InputError, NonFiniteLossError

SMALL: dict[str, Any] = {
    "model": "tiny:sdxl",
    "resolution": 64,
    "steps": 4,
    "batch_size": 2,
    "accumulation": 2,
    "rank": 4,
    "learning_rate": 1e-3,
    "checkpoint_every": 2,
    "probe_every": 2,
    "probe_size": 2,
    "device": "cpu",
}


class Killed(BaseException):
    """Ends a run as abruptly as Python allows."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and embeddings that all runs share."""
    return tmp_path_factory.mktemp("training-cache")


@pytest.fixture
def run(photo_pairs: Path, tmp_path: Path, cache: Path) -> Callable[..., TrainingReport]:
    """Train with small settings; data, output and anything else may be overridden."""

    def go(trainer: type[Trainer] = MaPOTrainer, output: str = "run", pipeline: Any = None, **settings: Any) -> Any:
        given = {**SMALL, "data": str(photo_pairs), "output": tmp_path / output, "cache_dir": cache}
        return trainer(trainer.config_class(**(given | settings)), pipeline=pipeline).train()

    return go


@pytest.fixture(scope="session")
def whole(photo_pairs: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """An undisturbed run with the small settings."""
    output = tmp_path_factory.mktemp("whole") / "run"
    MaPOTrainer(MaPOConfig(**SMALL, data=str(photo_pairs), output=output, cache_dir=cache)).train()
    return output


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock or the operating system says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "peak_memory_gb")} for row in rows]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "pytorch_lora_weights.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Losses of every step and the final weights, bit for bit."""
    assert metrics(one) == metrics(other)
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# --- learning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_overfitting_eight_pairs_ranks_them_all_right_and_denoises_winners_better(run, tmp_path):
    everything = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out", "ff.net.0.proj"]
    run(steps=150, batch_size=8, accumulation=1, rank=8, learning_rate=1e-2, targets=everything, probe_size=8,
        probe_every=25, checkpoint_every=150)  # fmt: skip
    looks = [row for row in metrics(tmp_path / "run") if "probe_margin_accuracy" in row]
    first = next(row for row in metrics(tmp_path / "run") if row["step"] == 0)
    assert first["probe_margin_accuracy"] < 0.8
    assert looks[-1]["probe_margin_accuracy"] == 1.0
    assert looks[-1]["winner_drift"] < 0


# Soft tokens leave the weights alone, see test_softrepa.
@pytest.mark.parametrize("method", [m for m in METHODS if issubclass(METHODS[m], DenoisingTrainer) and m != "softrepa"])
def test_every_method_lowers_its_own_loss(method, run, tmp_path, photo_pairs):
    extra = {"pretraining_data": str(photo_pairs)} if method == "rwl" else {}
    fixed = {"adaptation": "full", "learning_rate": 3e-3, "batch_size": 8, "accumulation": 1, "steps": 14}
    fixed |= {"checkpoint_every": 14, "probe_size": 0}
    run(METHODS[method], beta=20.0, **fixed) if method == "diffusion-dpo" else run(METHODS[method], **fixed, **extra)
    losses = [row["loss"] for row in metrics(tmp_path / "run") if row["step"]]
    assert sum(losses[-4:]) < sum(losses[:4]) * 0.95


def test_diffusion_dpo_starts_at_log_2_with_all_ties(run, tmp_path):
    run(DiffusionDPOTrainer, steps=1)
    first = next(row for row in metrics(tmp_path / "run") if row["step"] == 1)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["margin_accuracy"] == 0.5
    assert first["mse_w"] == first["ref_mse_w"]


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_the_reference_stays_what_it_was(adaptation, run, tmp_path):
    run(DiffusionDPOTrainer, adaptation=adaptation, steps=4, learning_rate=1e-2)
    rows = {row["step"]: row for row in metrics(tmp_path / "run")}
    # The probe asks for the same predictions each time: the reference's answers must not move, the policy's must.
    assert rows[4]["probe_ref_mse_w"] == pytest.approx(rows[2]["probe_ref_mse_w"], abs=1e-12)
    assert rows[4]["probe_mse_w"] != rows[2]["probe_mse_w"]


# --- splitting a batch, caching ---------------------------------------------------------------------------------


def test_accumulation_and_larger_batches_are_the_same_training(run, tmp_path):
    run(output="wide", batch_size=4, accumulation=1)
    run(output="long", batch_size=1, accumulation=4)
    for wide, long in zip(metrics(tmp_path / "wide"), metrics(tmp_path / "long"), strict=True):
        assert long["mse_w"] == pytest.approx(wide["mse_w"], rel=1e-4) if "mse_w" in wide else True
    one, other = adapter(tmp_path / "wide"), adapter(tmp_path / "long")
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=5e-4)


@pytest.mark.parametrize("settings", [{}, {"random_flip": True, "caption_dropout": 0.5, "aspect_buckets": True}])
def test_cached_and_uncached_runs_are_equal(settings, run, tmp_path):
    run(output="cached", steps=2, cache_dir=tmp_path / "cache", **settings)
    run(output="uncached", steps=2, cache=False, **settings)
    assert_same_run(tmp_path / "cached", tmp_path / "uncached")


def test_encoders_are_not_asked_again_once_everything_is_cached(run, tmp_path, monkeypatch, whole):
    from generation.training.encoding import LatentEncoder, PromptEncoder

    def never(*_: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(LatentEncoder, "encode", never)
    monkeypatch.setattr(PromptEncoder, "encode", never)
    run()
    assert_same_run(whole, tmp_path / "run")


# --- stopping and going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "settings"),
    [
        (MaPOTrainer, {"random_flip": True, "lora_dropout": 0.2, "ema_decay": 0.9, "lr_schedule": "cosine"}),
        (DiffusionDPOTrainer, {"adaptation": "lora", "caption_dropout": 0.3, "aspect_buckets": True}),
        (RewardWeightedTrainer, {"warmup_steps": 3}),
    ],
)
def test_a_run_killed_between_checkpoints_ends_as_the_undisturbed_one(trainer, settings, run, tmp_path, photo_pairs):
    if trainer is RewardWeightedTrainer:
        settings = settings | {"pretraining_data": str(photo_pairs)}
    settings = settings | {"accumulation": 1}
    run(trainer, output="whole", **settings)

    class Dying(trainer):  # type: ignore[misc, valid-type]
        def update(self, batches):
            if self.step == 3:
                raise Killed
            return super().update(batches)

    with pytest.raises(Killed):
        run(Dying, output="broken", **settings)
    report = run(trainer, output="broken", **settings)
    assert report.resumed_from == 2
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_full_fine_tune_resumes_bit_for_bit(run, tmp_path):
    settings = {"adaptation": "full", "steps": 4}
    run(output="whole", **settings)
    run(output="broken", adaptation="full", steps=2)
    run(output="broken", **settings)
    assert metrics(tmp_path / "whole")[-1] == metrics(tmp_path / "broken")[-1]
    one, other = (
        load_file(tmp_path / name / "export/unet/diffusion_pytorch_model.safetensors") for name in ("whole", "broken")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("moment", range(0, 14, 2))
def test_killed_while_a_checkpoint_is_written(moment, run, tmp_path, monkeypatch, whole):
    """Before each action on the checkpoint folder in turn; moments past the last action end undisturbed."""
    left = moment

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def action(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*arguments, **named)

        return action

    with monkeypatch.context() as patch:
        from generation.training import run_folder

        patch.setattr(run_folder.os, "fsync", counted(run_folder.os.fsync))
        patch.setattr(run_folder.shutil, "rmtree", counted(run_folder.shutil.rmtree))
        patch.setattr(Path, "replace", counted(Path.replace))
        with contextlib.suppress(Killed):
            run(keep_checkpoints=1)
    run(keep_checkpoints=1)
    assert_same_run(whole, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]


def test_ctrl_c_ends_the_step_and_saves_it(run, tmp_path, whole):

    class Interrupted(MaPOTrainer):
        def update(self, batches):
            if self.step == 2:
                signal.raise_signal(signal.SIGINT)
            return super().update(batches)

    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell has started us in the background
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted)
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    assert run().resumed_from == 3
    assert_same_run(whole, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


def test_only_the_newest_checkpoints_are_kept_and_each_loads_as_an_adapter(run, tmp_path):
    run(checkpoint_every=1, keep_checkpoints=2)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004"]
    for name in kept:
        pipeline = tiny_pipeline("sdxl")
        pipeline.load_lora_weights(tmp_path / "run" / "checkpoints" / name)
        assert pipeline.get_active_adapters()


def test_a_longer_run_continues_a_finished_one(run, tmp_path, whole):
    run(steps=2)
    assert run(steps=4).resumed_from == 2
    assert_same_run(whole, tmp_path / "run")


def test_other_settings_do_not_continue_a_run(run, tmp_path):
    run(steps=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match=r"learning_rate 0\.001 -> 0\.5"):
        run(learning_rate=0.5)
    with pytest.raises(InputError, match="rank 4 -> 8"):
        run(rank=8)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_other_data_do_not_continue_a_run(run, tmp_path, photo_pairs):
    data = tmp_path / "pairs"
    shutil.copytree(photo_pairs, data)
    run(data=str(data), steps=2)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(InputError, match="not those that"):
        run(data=str(data))


def test_two_runs_cannot_share_a_folder(run, tmp_path):
    entered, leave = threading.Event(), threading.Event()

    class Waiting(MaPOTrainer):
        def update(self, batches):
            entered.set()
            leave.wait(60)
            return super().update(batches)

    thread = threading.Thread(target=run, args=(Waiting,), kwargs={"steps": 1})
    thread.start()
    try:
        assert entered.wait(60)
        with pytest.raises(InputError, match="another process is training"):
            run(steps=1)
    finally:
        leave.set()
        thread.join()


# --- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"alpha": 2.0}, {"rslora": True, "alpha": 16.0}, {"dora": True}])
def test_both_exports_give_the_trainers_own_output(settings, run, tmp_path):
    pipeline = tiny_pipeline("sdxl")
    report = run(pipeline=pipeline, learning_rate=5e-2, steps=2, probe_size=0, **settings)
    wanted = 1 if settings.get("dora") else 2
    assert len(report.exported) == wanted
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(2)),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, 32, generator=torch.Generator().manual_seed(3)),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        },
    }
    with torch.no_grad():
        trained = pipeline.unet.eval()(**inputs).sample
        base = tiny_pipeline("sdxl").unet(**inputs).sample
        assert (trained - base).abs().max() > 1e-3
        for path in report.exported:
            fresh = tiny_pipeline("sdxl")
            fresh.load_lora_weights(path.parent, weight_name=path.name)
            assert torch.equal(fresh.unet(**inputs).sample, trained), path


def test_a_full_fine_tune_exports_a_unet(run, tmp_path):
    from diffusers import UNet2DConditionModel

    pipeline = tiny_pipeline("sdxl")
    (folder,) = run(pipeline=pipeline, adaptation="full", steps=2).exported
    loaded = UNet2DConditionModel.from_pretrained(folder)
    state = pipeline.unet.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    base = tiny_pipeline("sdxl").unet.state_dict()
    assert any(not torch.equal(value, base[name]) for name, value in state.items())


def test_the_average_is_what_is_exported(run, tmp_path):
    pipeline, steps = tiny_pipeline("sdxl"), []

    class Watched(MaPOTrainer):
        def update(self, batches):
            values = super().update(batches)
            steps.append({k: v.detach().clone() for k, v in pipeline.unet.named_parameters() if "lora_B" in k})
            return values

    run(Watched, pipeline=pipeline, ema_decay=0.15)
    exported = adapter(tmp_path / "run")
    for name, average in steps[0].items():  # the average begins at the first step's weights
        for number, step in enumerate(steps[1:], 1):
            decay = min(0.15, (1 + number) / (10 + number))  # the warm-up of diffusers' EMAModel
            average = decay * average + (1 - decay) * step[name]
        key = f"unet.{name.replace('.default', '')}"
        torch.testing.assert_close(exported[key], average, rtol=0, atol=1e-7)
        assert not torch.equal(exported[key], steps[-1][name])


def test_settings_samples_and_left_out_rows_are_in_the_run_folder(run, tmp_path, photo_pairs, caplog):
    data = tmp_path / "pairs"
    shutil.copytree(photo_pairs, data)
    with (data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"winner": "nowhere.png", "loser": "0-0.png", "caption": "a cat"}) + "\n")
    report = run(data=str(data), validation_prompts=["a red bus", "two dogs"], validate_every=2, validation_steps=2)
    folder = tmp_path / "run"
    echoed = yaml.safe_load((folder / "config.yaml").read_text())
    assert set(echoed) == {"method", *(field.name for field in dataclasses.fields(MaPOConfig))}
    assert echoed["beta"] == 0.1
    for step in (0, 2, 4):
        with Image.open(folder / "samples" / f"step-{step:06d}.png") as image:
            assert min(image.size) > 64
    assert report.left_out == 1
    (line,) = (folder / "left_out_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "missing"
    (warning,) = report.warnings
    assert "nowhere.png" in warning
    assert [record.getMessage() for record in caplog.records if record.name.startswith("generation")] == [warning]


def test_looking_on_does_not_change_the_training(run, tmp_path, whole):
    run(validation_prompts=["a red bus"], validate_every=1, validation_steps=2)
    assert_same_run(whole, tmp_path / "run")


def test_renderings_follow_the_training(run, tmp_path):
    run(validation_prompts=["a red bus"], validate_every=4, validation_steps=2, learning_rate=5e-2)
    first, last = (Image.open(tmp_path / "run/samples" / f"step-{n:06d}.png").convert("RGB") for n in (0, 4))
    picture = (20, 60, 100, 140)  # inside the picture, below its heading
    assert first.crop(picture).tobytes() != last.crop(picture).tobytes()


def test_tensorboard_is_written_when_asked_for(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(steps=2, tensorboard=True)
    (events,) = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents*") if path.stat().st_size > 1000}
    read = EventAccumulator(str(events))
    read.Reload()
    logged = [row["loss"] for row in metrics(tmp_path / "run") if row["step"]]
    assert [event.value for event in read.Scalars("loss")] == pytest.approx(logged, rel=1e-6)


# --- precision, families, refusals ------------------------------------------------------------------------------


def test_adapters_are_float32_on_a_bfloat16_base_and_move_by_the_learning_rate(run, tmp_path):
    pipeline = tiny_pipeline("sdxl")
    run(pipeline=pipeline, dtype="bfloat16", steps=1, learning_rate=1e-5)
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    frozen = [p for p in pipeline.unet.parameters() if not p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    ups = torch.cat([p.detach().flatten() for n, p in pipeline.unet.named_parameters() if "lora_B" in n])
    # One AdamW step from zero moves every weight with a gradient by the learning rate; bfloat16 weights of usual size
    # would not move at all.
    assert ups.abs().median().item() == pytest.approx(1e-5, rel=0.05)


def test_gradient_checkpointing_changes_nothing(run, tmp_path, whole):
    run(gradient_checkpointing=True)
    one, other = adapter(whole), adapter(tmp_path / "run")
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)


def test_gradient_checkpointing_leaves_the_reference_alone(run, tmp_path):
    run(DiffusionDPOTrainer, output="plain", steps=2)
    run(DiffusionDPOTrainer, output="checkpointed", gradient_checkpointing=True, steps=2)
    for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "checkpointed"), strict=True):
        assert one.keys() == other.keys()
        assert all(other[key] == pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in one.items())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sd15_and_velocity_models_train(prediction, run, tmp_path):
    pipeline = load_pipeline("tiny:sd15", device="cpu")
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    report = run(pipeline=pipeline, min_snr_gamma=5.0, steps=2)
    fresh = tiny_pipeline("sd15")
    for path in report.exported:
        fresh.load_lora_weights(path.parent, weight_name=path.name)


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_row(run, tmp_path):
    class Poisoned(MaPOTrainer):
        def loss(self, batch):
            loss, values = super().loss(batch)
            if self.step == 2 and "metadata.jsonl line 3" in batch.names:
                values["mse_w"][batch.names.index("metadata.jsonl line 3")] = float("nan")
                loss = loss * float("nan")
            return loss, values

    with pytest.raises(NonFiniteLossError, match=r"step 3: .*line 3 \(timestep \d+\)\. ") as caught:
        run(Poisoned, batch_size=8, accumulation=1)
    assert "line 4" not in str(caught.value)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]


def test_a_flow_model_is_refused_with_the_ways_out(run):
    with pytest.raises(InputError, match=r"sd3 pipeline.*SDXL and SD 1\.5"):
        run(model="tiny:sd3")


def test_bad_rows_are_refused_before_a_model_is_loaded(run, tmp_path, photo_pairs):
    data = tmp_path / "pairs"
    shutil.copytree(photo_pairs, data)
    (data / "0-0.png").write_bytes((data / "0-0.png").read_bytes()[:500])
    with pytest.raises(InputError, match=r"1 row of .* cannot be used"):
        run(data=str(data), bad_rows="refuse", model="no/such-model")


@pytest.mark.parametrize(
    ("trainer", "settings", "message"),
    [
        (MaPOTrainer, {"data": ""}, "no training data"),
        (MaPOTrainer, {"dtype": "float16"}, "float16 needs a CUDA device"),
        (RewardWeightedTrainer, {}, "no pretraining_data"),
        (SupervisedTrainer, {"targets": ["to_nothing"]}, "to_nothing"),
    ],
)
def test_settings_that_cannot_work_say_what_to_do(trainer, settings, message, run):
    with pytest.raises(InputError, match=message):
        run(trainer, **settings)


def test_rewards_weight_the_images(run, tmp_path, photo_pairs):
    """Reward 0 for all and no pre-training data: nothing is learnt; a reward outside [0, 1] is refused by name."""
    data = tmp_path / "images"
    shutil.copytree(photo_pairs, data)
    rows = [{"file_name": f"{i}-0.png", "caption": f"photo {i}", "reward": 0.0} for i in range(4)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(RewardWeightedTrainer, data=str(data), beta=0.0, weight_decay=0.0)
    assert all(value.abs().max() == 0 for key, value in adapter(tmp_path / "run").items() if "lora_B" in key)
    rows[1]["reward"] = 7.0
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"line 2 has the reward 7"):
        run(RewardWeightedTrainer, output="other", data=str(data), beta=0.0)


def test_configs_are_plain_python(photo_pairs, tmp_path):
    """The documented way: a config, a trainer, a report."""
    config = SupervisedConfig(**{**SMALL, "data": photo_pairs, "output": tmp_path / "run", "steps": 1})
    assert SupervisedTrainer(config).train().step == 1
    for kind in (DiffusionDPOConfig, RewardWeightedConfig, SupervisedConfig, MaPOConfig):
        with pytest.raises(ValueError, match="rank"):
            kind(rank=0)
