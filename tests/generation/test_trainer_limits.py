"""What no setting rules out: full disks and GPUs, processes that differ, second runs, models of another kind."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from generation.methods import (
    METHODS,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    RewardWeightedTrainer,
    SupervisedTrainer,
)
from generation.tiny import tiny_pipeline
from generation.training import learner as learner_module
from generation.training import run_folder
from generation.training import trainer as trainer_module
from generation.training.configuration import TrainingConfig
from generation.training.denoiser import Batch, Conditioning, Denoiser
from generation.training.denoising import DenoisingTrainer
from generation.training.hardware import training_dtype
from generation.training.monitor import check_finite
from generation.training.run_folder import RunFolder
from generation.training.trainer import Trainer, TrainingReport
from mmalign import cli
from mmalign.errors import InputError, NonFiniteLossError

Run = Callable[..., TrainingReport]


@pytest.fixture(scope="session")
def limits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits-cache")


@pytest.fixture
def run(photo_pairs: Path, tmp_path: Path, limits_cache: Path) -> Run:
    """Train two steps in `tmp_path / "run"`, with anything overridden; `reward` goes to the trainer."""

    def go(kind: type[Trainer] = MaPOTrainer, reward: Any = None, **settings: Any) -> TrainingReport:
        given = {"data": str(photo_pairs), "output": tmp_path / "run", "cache_dir": limits_cache, "model": "tiny:sdxl"}
        given |= {"resolution": 64, "steps": 2, "batch_size": 2, "accumulation": 2, "rank": 4, "probe_size": 0}
        given |= {"learning_rate": 1e-3, "device": "cpu"}
        return kind(kind.config_class(**(given | settings)), reward=reward).train()

    return go


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def a_batch() -> Batch:
    """Two pairs of random numbers, for the tiny SDXL."""
    generator = torch.Generator().manual_seed(0)
    shapes = (77, 64), (32,)
    embeds, pooled = (torch.randn(2, *shape, generator=generator) for shape in shapes)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    latents, noise = (torch.randn(count, 4, 8, 8, generator=generator) for count in (4, 2))
    return Batch(
        ["row 1", "row 2"],
        latents,
        noise.repeat(2, 1, 1, 1),
        torch.tensor([100, 700]).repeat(2),
        Conditioning(embeds, pooled, sizes).repeat(2),
    )


# --- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_full_fine_tunes_reference_begins_as_the_network_itself(dtype: str, tmp_path: Path) -> None:
    config = DiffusionDPOTrainer.config_class(
        output=tmp_path / "run", model="tiny:sdxl", adaptation="full", dtype=dtype, device="cpu"
    )
    trainer = DiffusionDPOTrainer(config)  # type: ignore[arg-type]
    trainer.attach(tiny_pipeline("sdxl"))
    with trainer.reference() as reference:
        dtypes = {parameter.dtype for parameter in reference.parameters()}
    assert getattr(torch, dtype) in dtypes
    loss, values = trainer.loss(a_batch())
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)  # the same arithmetic: not nearly, exactly
    assert values["margin_accuracy"].tolist() == [0.5, 0.5]


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert training_dtype(TrainingConfig(), torch.device("cuda")) == torch.float16


def test_lora_dropout_touches_no_gpu_but_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # With these two, forking every GPU's random state fails, as it does where another process fills one of them.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    trainer = MaPOTrainer(MaPOConfig(output=Path("run"), model="tiny:sdxl", lora_dropout=0.5, device="cpu"))
    trainer.attach(tiny_pipeline("sdxl"))
    before = torch.get_rng_state()
    with trainer.learner._dropout_stream(0):
        drawn = torch.rand(3)
    with trainer.learner._dropout_stream(0):
        assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_scaled_as_in_edm_is_refused_although_it_says_epsilon() -> None:
    from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

    Denoiser(nn.Linear(1, 1), EulerDiscreteScheduler().config)
    with pytest.raises(InputError, match="EDM"):
        Denoiser(nn.Linear(1, 1), EDMEulerScheduler(prediction_type="epsilon").config)


# --- a second run -----------------------------------------------------------------------------------------------


def test_a_trainer_that_failed_begins_again_at_the_first_step(run: Run, tmp_path: Path) -> None:
    failed = False

    class FailsOnce(MaPOTrainer):
        def update(self, batches):
            nonlocal failed
            if self.step == 1 and not failed:
                failed = True
                raise NonFiniteLossError("once")
            return super().update(batches)

        def train(self):
            with pytest.raises(NonFiniteLossError):
                super().train()
            return super().train()

    report = run(FailsOnce)
    assert report.resumed_from is None
    assert [row["step"] for row in logged(tmp_path / "run")] == [1, 2]


def test_a_resumed_run_of_other_processes_says_so(run: Run, tmp_path: Path) -> None:
    run(steps=1)
    assert run(steps=1).warnings == []
    state = tmp_path / "run/checkpoints/step-000001/trainer.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"processes": 4}))
    (warning,) = run().warnings
    assert "4 processes and resumed with 1" in warning


def test_a_sharded_run_goes_on_in_its_learning_rate_schedule(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (learner_module, trainer_module):
        monkeypatch.setattr(module, "is_sharded", lambda accelerator: True)
    settings = {"adaptation": "full", "warmup_steps": 4, "accumulation": 1}
    (unet,) = run(steps=2, **settings).exported
    assert (unet / "diffusion_pytorch_model.safetensors").stat().st_mode & 0o044  # for others to load
    assert run(steps=4, **settings).resumed_from == 2
    rates = [row["learning_rate"] for row in logged(tmp_path / "run")]
    assert rates == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3])


def test_a_gradient_norm_that_is_sharded_is_logged_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharded:
        def full_tensor(self) -> torch.Tensor:
            return torch.tensor(2.5)

    trainer = MaPOTrainer(MaPOConfig(output=tmp_path / "run", model="tiny:sdxl", accumulation=1, device="cpu"))
    trainer.attach(tiny_pipeline("sdxl"))
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda *_: Sharded())
    assert trainer.update([a_batch()])["grad_norm"] == 2.5


# --- full disks and GPUs ----------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [500_000, 1_500_000])  # ends the weights' file of 1 MB, the optimiser's of 2.3 MB
def test_a_disk_that_is_full_is_told_in_one_line(size: int, run: Run, tmp_path: Path) -> None:
    with files_of_at_most(size), pytest.raises(InputError, match="checkpoint of step 1 could not be written") as told:
        run(adaptation="full", steps=1)
    assert "\n" not in str(told.value)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=lambda error: str(error)[:12],
)
def test_a_full_disk_is_told_however_torch_words_it(
    error: Exception, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(states: Any, file: Any) -> None:
        assert file.fileno() > 2  # Python's own file, which knows why it cannot be written
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"checkpoint of step 1 could not be written .*(disk is full|No space left)"):
        run(steps=1)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_another_error_of_torch_is_no_full_disk(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(states: Any, file: Any) -> None:
        raise RuntimeError("a tensor of another world")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="another world"):
        run(steps=1)


def test_a_log_that_cannot_be_written_is_told_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match=r"metrics\.jsonl' cannot be written \(Is a directory\); mend that"):
        run(steps=1)


def test_an_error_of_ones_own_code_is_left_as_it_is(run: Run) -> None:
    class Own(MaPOTrainer):
        def loss(self, batch):
            raise FileNotFoundError("a lookup table of the caller's")

    with pytest.raises(FileNotFoundError, match="lookup table"):
        run(Own)


def test_a_full_gpu_is_told_with_the_settings_that_need_less(run: Run) -> None:
    class Hungry(MaPOTrainer):
        def loss(self, batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(InputError, match=r"batch_size 1 with accumulation 4 or gradient_checkpointing or .*8bit"):
        run(Hungry)


def test_a_checkpoints_name_is_on_the_disk_before_an_older_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, events = RunFolder(tmp_path), []
    real_open, real_replace = os.open, Path.replace

    def fill(step: int) -> None:
        with folder.checkpoint(step, keep=1) as fresh:
            (fresh / "trainer.json").write_text("{}")

    fill(1)
    monkeypatch.setattr(
        run_folder.os, "open", lambda path, *rest: events.append(Path(path).name) or real_open(path, *rest)
    )
    monkeypatch.setattr(
        Path, "replace", lambda path, target: events.append(f"-> {Path(target).name}") or real_replace(path, target)
    )
    fill(2)
    named, gone = events.index("-> step-000002"), events.index("-> .step-000001-old")
    assert "checkpoints" in events[named:gone]
    assert "trainer.json" in events[:named]


# --- several processes, several sets ----------------------------------------------------------------------------


def test_a_bad_row_of_another_process_is_named_by_all() -> None:
    batch, fine = replace(a_batch(), names=["row 1", "row 2"]), {"loss": torch.ones(1), "mse_w": torch.ones(2)}
    with pytest.raises(NonFiniteLossError, match=r"rows: row 9 \(timestep 3\)\. "):
        check_finite(1, {"loss": math.nan}, [fine], [batch], gather=lambda own: [*own, "row 9 (timestep 3)"])


def test_rows_left_out_are_no_crash_to_a_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photo_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = TrainingReport(tmp_path, 1, None, [], {}, left_out=1)
    monkeypatch.setattr(MaPOTrainer, "train", lambda self: report)
    monkeypatch.setattr(sys, "argv", ["mmalign", "train", "mapo", str(photo_pairs), str(tmp_path / "run")])
    for processes, code in (("1", 4), ("2", 0)):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (ended.value.code or 0) == code
        assert "1 row was left out" in capsys.readouterr().err


def test_a_score_of_ones_own_filters_the_pretraining_images_as_well(
    run: Run, tmp_path: Path, photo_pairs: Path
) -> None:
    wanted = json.loads((photo_pairs / "metadata.jsonl").read_text().splitlines()[0])["caption"]
    seen: list[str] = []

    def score(images: Any, captions: list[str]) -> list[float]:
        seen.extend(captions)
        return [float(caption == wanted) for caption in captions]

    run(RewardWeightedTrainer, reward=score, min_score=0.5, pretraining_data=str(photo_pairs), steps=1)
    for name in ("left_out_rows.jsonl", "left_out_pretraining_rows.jsonl"):
        reasons = [json.loads(line)["reason"] for line in (tmp_path / "run" / name).read_text().splitlines()]
        assert reasons == ["low_score"] * 7


def images_of(photo_pairs: Path, folder: Path, rows: list[dict[str, Any]]) -> str:
    """Captioned images, with what else is given of each."""
    shutil.copytree(photo_pairs, folder)
    entries = [{"file_name": f"{n}-0.png", "caption": f"photo {n}"} | row for n, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return str(folder)


def test_images_without_a_reward_are_left_out_by_name(run: Run, tmp_path: Path, photo_pairs: Path) -> None:
    data = images_of(photo_pairs, tmp_path / "images", [{"reward": 0.0}, {}, {"reward": 0.0}, {"score": 0.5}])
    report = run(RewardWeightedTrainer, data=data, beta=0.0, steps=1, weight_decay=0.0)
    assert report.left_out == 2
    listed = [json.loads(line) for line in (tmp_path / "run" / "left_out_rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in listed] == [(1, "missing_reward"), (3, "missing_reward")]
    assert logged(tmp_path / "run")[-1]["reward"] == 0  # none counts 1
    with pytest.raises(InputError, match="2 rows of"):
        run(RewardWeightedTrainer, data=data, beta=0.0, bad_rows="refuse", output=tmp_path / "other")


@pytest.mark.parametrize(
    ("row", "asked"), [({"score": 0.5}, "rename 'score'"), ({"rewards": 0.5}, "rename 'rewards'"), ({}, "add it to")]
)
def test_images_without_any_reward_are_refused(
    row: dict[str, Any], asked: str, run: Run, tmp_path: Path, photo_pairs: Path
) -> None:
    data = images_of(photo_pairs, tmp_path / "images", [row] * 3)
    with pytest.raises(InputError, match=rf"no image of .* has a reward.*column 'reward' .*\[0, 1\] \({asked}"):
        run(RewardWeightedTrainer, data=data, beta=0.0)
    run(SupervisedTrainer, data=data, steps=1)  # which needs none


def test_images_where_pairs_are_wanted_are_told_who_takes_them(run: Run, tmp_path: Path, photo_pairs: Path) -> None:
    data = images_of(photo_pairs, tmp_path / "images", [{}] * 3)
    table = pa.table({"image": [(photo_pairs / "0-0.png").read_bytes()], "caption": ["a"]})
    pq.write_table(table, tmp_path / "images.parquet")
    for place in (data, str(tmp_path / "images.parquet")):
        with pytest.raises(InputError, match=r"mapo trains on pairs; .*mmalign train sft` takes captioned") as told:
            run(data=place)
        assert "--kind" not in str(told.value)


def test_a_run_folder_among_the_data_is_refused(run: Run, tmp_path: Path, photo_pairs: Path) -> None:
    data = images_of(photo_pairs, tmp_path / "pairs", [{}])
    for output in (tmp_path / "pairs", tmp_path / "pairs" / "runs" / "a", tmp_path / "x" / ".." / "pairs"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="is in the training data"):
            run(SupervisedTrainer, data=data, output=output)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_report_is_json(run: Run, tmp_path: Path) -> None:
    report = run(steps=1)
    report.values["grad_norm"] = math.inf  # as loss scaling leaves it
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["output"] == str(tmp_path / "run")
    assert told["exported"] == [str(path) for path in report.exported]
    assert (told["step"], told["resumed_from"], told["left_out"], told["warnings"]) == (1, None, 0, [])
    assert told["values"]["loss"] == report.values["loss"]
    assert told["values"]["grad_norm"] is None


@pytest.mark.parametrize("method", [m for m in METHODS if issubclass(METHODS[m], DenoisingTrainer)])
def test_progress_bar_and_curves_show_what_the_method_has(method: str, run: Run, tmp_path: Path, curves: None) -> None:
    extra = {"beta": 0.0} if method == "rwl" else {}
    trainer = METHODS[method]
    report = run(trainer, steps=1, probe_size=2, **extra)
    assert {name for name, _ in trainer.shown.values()} <= set(report.values)
    assert ("ranked right" in trainer.shown) == (method in ("mapo", "diffusion-dpo"))
    assert (tmp_path / "run" / "curves.png").is_file()


def test_pretraining_images_are_checked_by_their_own_rules_and_counted(
    run: Run, tmp_path: Path, photo_pairs: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(photo_pairs, images)
    rows = [{"file_name": f"{n}-0.png", "caption": f"photo {n}"} for n in range(4)]
    rows.append({"file_name": "gone.png", "caption": "a lost one"})
    (images / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    # A margin is of pairs, and these have none.
    settings = {"pretraining_data": str(images), "min_margin": -1.0, "steps": 1}
    report = run(RewardWeightedTrainer, reward=lambda images, captions: [0.0] * len(captions), **settings)
    assert report.left_out == 1
    (warning,) = report.warnings
    assert "gone.png" in warning
    with pytest.raises(InputError, match="1 row of"):
        run(RewardWeightedTrainer, pretraining_data=str(images), bad_rows="refuse", output=tmp_path / "other")
    with pytest.raises(InputError, match="pretraining_split is given without"):
        run(RewardWeightedTrainer, pretraining_split="train", beta=0.0)
