"""SoftREPA: its loss beside a loop, its batches, and the trainer on tiny models and real photographs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

from generation import generate, tiny_pipeline
from generation.data import check_data
from generation.methods import SoftREPAConfig, SoftREPATrainer
from generation.objectives import denoising_logits, denoising_matrix, softrepa_loss
from generation.soft_tokens import SoftTokens
from generation.training.caption_contrast import ContrastBatch, grid_of, hold_out
from generation.training.denoiser import Batch, Conditioning
from generation.training.flow_denoiser import FlowDenoiser
from generation.training.trainer import TrainingReport
from mmalign.errors import InputError

# -- the loss ----------------------------------------------------------------------------------------------------------


def by_hand(errors: list[list[float]], own: list[int], masked: set[tuple[int, int]]) -> float:
    """Mean cross-entropy over rows."""
    total = 0.0
    for i, row in enumerate(errors):
        logits = {j: 4 * math.exp(-e / 0.07) for j, e in enumerate(row) if (i, j) not in masked}
        total += math.log(sum(map(math.exp, logits.values()))) - logits[own[i]]
    return total / len(errors)


def test_the_loss_is_that_of_a_loop() -> None:
    errors = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 5
    plain, rows = softrepa_loss(errors), errors.tolist()
    assert plain.loss.item() == pytest.approx(by_hand(rows, [0, 1, 2], set()), abs=1e-12)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3] = mask[2, 1] = True
    masked = softrepa_loss(errors, mask=mask, targets=torch.tensor([4, 0, 2]), denoising_weight=10.0)
    matched = (rows[0][4] + rows[1][0] + rows[2][2]) / 3
    wanted = by_hand(rows, [4, 0, 2], {(0, 3), (2, 1)}) + 10 * matched
    assert masked.loss.item() == pytest.approx(wanted, abs=1e-12)
    both = softrepa_loss(errors, symmetric=True)
    columns = [[rows[i][j] for i in range(3)] for j in range(3)]
    assert both.loss.item() == pytest.approx((plain.loss.item() + by_hand(columns, [0, 1, 2], set())) / 2, abs=1e-12)
    ranked = [min(range(5), key=row.__getitem__) == i for i, row in enumerate(rows)]
    assert plain.ranked_right.tolist() == ranked


def test_half_precision_is_computed_in_float32_and_masked_entries_get_no_gradient() -> None:
    errors = torch.tensor([[0.02, 1.4], [0.5, 0.03]], dtype=torch.float16, requires_grad=True)
    terms = softrepa_loss(errors, mask=torch.tensor([[False, True], [False, False]]))
    assert terms.loss.dtype == torch.float32
    assert terms.contrastive[0] == 0
    terms.loss.backward()
    assert errors.grad is not None
    assert errors.grad[0].tolist() == [0, 0]
    assert errors.grad[1, 0] < 0 < errors.grad[1, 1]
    logits = denoising_logits(torch.tensor([0.0, 1.4], dtype=torch.float16))
    assert logits[0] == 4
    assert logits[1].item() == pytest.approx(4 * math.exp(-20), rel=2e-2)


# -- batches -----------------------------------------------------------------------------------------------------------


def images(*captions: str, sd: int = 0) -> Batch:
    """A row a caption, whose embedding is a function of its text."""
    generator = torch.Generator().manual_seed(sd)
    embeds = torch.stack([torch.full((3, 2), float(sum(map(ord, c)))) + torch.arange(6).view(3, 2) for c in captions])
    n = len(captions)
    latents, noise = (torch.randn(n, 4, 2, 2, generator=generator) for _ in range(2))
    told = Conditioning(embeds, embeds[:, 0], torch.arange(n * 6.0).view(n, 6))
    return Batch(list(captions), latents, noise, torch.arange(n), told)


def test_a_batch_has_one_noise_and_time_and_knows_captions_that_fit_as_well() -> None:
    rows, others = images("cat", "dog", "cat"), [images("dog", sd=1), images("a hound", sd=2)]
    others[1].latents.copy_(rows.latents[1:2])  # another caption of the same image
    batch = ContrastBatch.of(rows, others)
    assert torch.equal(batch.images.noise, rows.noise[:1].expand(3, -1, -1, -1))
    assert batch.images.timesteps.tolist() == [0, 0, 0]
    assert batch.own.tolist() == [0, 1, 2]
    fits = [[False, False, True, False, False], [False, False, False, True, True], [True, False, False, False, False]]
    assert batch.equal.tolist() == fits
    parts = batch.parts(2)
    assert [part.own.tolist() for part in parts] == [[0, 1], [2]]
    assert torch.equal(parts[1].equal, batch.equal[2:])
    assert torch.equal(parts[1].images.latents, rows.latents[2:])


def test_the_grid_is_prompt_major_with_sizes_of_the_image() -> None:
    rows, captions = images("cat", "dog"), images("one", "two", "three").conditioning
    grid = grid_of(rows, captions)
    for caption in range(3):
        for image in range(2):
            place = caption * 2 + image
            assert torch.equal(grid.latents[place], rows.latents[image])
            assert torch.equal(grid.noise[place], rows.noise[image])
            assert torch.equal(grid.conditioning.prompt_embeds[place], captions.prompt_embeds[caption])
            assert torch.equal(grid.conditioning.pooled_prompt_embeds[place], captions.pooled_prompt_embeds[caption])
            assert torch.equal(grid.conditioning.time_ids[place], rows.conditioning.time_ids[image])
    errors = denoising_matrix(grid.latents, torch.zeros_like(rows.latents))
    torch.testing.assert_close(errors, rows.latents.square().mean((1, 2, 3))[:, None].expand(2, 3))


def test_held_out_pairs_share_nothing_with_those_trained_on(tmp_path: Path, photos: Path) -> None:
    files = sorted(photos.glob("*.jpg"))[:6]
    rows = [(0, "a"), (0, "b"), (1, "c"), (2, "c"), (3, "d"), (4, "e"), (5, "f")]
    lines = [json.dumps({"file_name": str(files[file]), "caption": caption}) for file, caption in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    checked, seen = check_data(tmp_path, progress=False), set()
    for seed in range(8):
        trained, held_out = hold_out(checked, 2, seed)
        assert held_out is not None
        assert len(held_out.examples) == 2
        for of in (lambda one: one.caption, lambda one: one.images[0].sha256):
            assert not {of(one) for one in trained.examples} & {of(one) for one in held_out.examples}
            assert len({of(one) for one in held_out.examples}) == 2
        again = hold_out(checked, 2, seed)
        assert (again[0].fingerprint, again[1].fingerprint) == (trained.fingerprint, held_out.fingerprint)  # type: ignore[union-attr]
        seen.add(held_out.fingerprint)
    assert len(seen) > 1
    assert hold_out(checked, 0, 0)[1] is None
    with pytest.raises(InputError, match="has 7 usable pairs, too few to hold out 6"):
        hold_out(checked, 6, 0)


def test_a_flow_model_is_trained_between_image_and_noise() -> None:
    pipeline = tiny_pipeline("sd3")
    denoiser = FlowDenoiser(pipeline.transformer, pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 16, 8, 8, generator=generator) for _ in range(2))
    told = Conditioning(torch.randn(2, 5, 128, generator=generator), torch.randn(2, 64, generator=generator))
    batch = Batch(["a", "b"], latents, noise, torch.tensor([250, 1000]), told)
    assert torch.equal(denoiser.target(batch), noise - latents)
    mixed = torch.stack([0.75 * latents[0] + 0.25 * noise[0], noise[1]])
    with torch.no_grad():
        found = denoiser.predict(batch)
        wanted = pipeline.transformer(
            mixed, told.prompt_embeds, told.pooled_prompt_embeds, torch.tensor([250.0, 1000.0])
        ).sample
    torch.testing.assert_close(found, wanted)


# -- the trainer -------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "model": "tiny:sd15", "resolution": 64, "steps": 4, "batch_size": 3, "learning_rate": 1e-2, "checkpoint_every": 2,
    "probe_every": 2, "probe_size": 2, "probe_draws": 2, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("softrepa-cache")


@pytest.fixture(scope="session")
def captioned(photos: Path, captions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight captioned photographs."""
    folder = tmp_path_factory.mktemp("captioned")
    lines = []
    for row in captions[:8]:
        with Image.open(photos / row["file"]) as image:
            image.convert("RGB").resize((80, 72)).save(folder / f"{Path(row['file']).stem}.png")
        lines.append({"file_name": f"{Path(row['file']).stem}.png", "caption": row["captions"][0]})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def run(captioned: Path, tmp_path: Path, cache: Path) -> Callable[..., TrainingReport]:
    def go(output: str = "run", trainer: type = SoftREPATrainer, pipeline: Any = None, **settings: Any) -> Any:
        given = {**SMALL, "data": captioned, "output": tmp_path / output, "cache_dir": cache, **settings}
        given = {name: value for name, value in given.items() if not (pipeline and name == "model")}
        return trainer(SoftREPAConfig(**given), pipeline=pipeline).train()

    return go


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "peak_memory_gb")} for row in rows]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "soft_tokens.safetensors")


def test_the_defaults_are_the_released_recipe() -> None:
    config = SoftREPAConfig()
    assert (config.scale, config.temperature, config.tokens, config.layers) == (4.0, 0.07, 4, 5)
    assert (config.batch_size, config.learning_rate, config.weight_decay, config.resolution) == (4, 1e-3, 1e-4, 512)
    assert "counting" in (SoftREPAConfig.__doc__ or "")
    assert "FID" in (SoftREPAConfig.__doc__ or "")


@pytest.mark.parametrize(("family", "weight"), [("sd3", 0), ("sdxl", 10), ("sd15", 10)])
def test_every_family_is_trained_and_its_tokens_are_drawn_with(family: str, weight: int, run: Any) -> None:
    pipeline = tiny_pipeline(family)
    state = {name: value.clone() for name, value in denoiser(pipeline).state_dict().items()}
    report = run(pipeline=pipeline, layers=2, steps=2, validation_prompts=["a dog"], validation_steps=2)
    first = metrics(report.output)[1]
    assert first["loss"] == pytest.approx(first["contrastive"] + weight * first["mse"], rel=1e-4)
    assert {"probe_match_accuracy", "probe_pair_accuracy", "probe_loss", "probe_mse"} <= set(metrics(report.output)[0])
    now = denoiser(pipeline).state_dict()
    assert all(torch.equal(now[name], value) for name, value in state.items())
    assert set(now) - set(state) <= {"soft_tokens.tokens", "soft_tokens.time_table"}
    (file,) = report.exported
    tokens = SoftTokens.load(file)
    assert (tokens.placement, tokens.time_table is None) == (
        "prepend" if family == "sd3" else "after-bos", family == "sdxl"
    )  # fmt: skip
    (plain,), (soft,) = (
        generate("a dog", model=tiny_pipeline(family), adapter=adapter, seed=0, steps=2)
        for adapter in (None, report.output)
    )
    assert plain.image.tobytes() != soft.image.tobytes()
    assert (report.output / "samples" / "step-000002.png").is_file() or list((report.output / "samples").iterdir())


def denoiser(pipeline: Any) -> Any:
    from generation.pipelines import denoiser_of

    return denoiser_of(pipeline)[1]


def test_sd15_begins_at_the_first_state_of_the_empty_prompt(run: Any) -> None:
    report = run(learning_rate=1e-12, steps=1, probe_size=0)
    pipeline = tiny_pipeline("sd15")
    ids = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        first = pipeline.text_encoder(ids).last_hidden_state[0, 0]
    torch.testing.assert_close(saved(report.output)["tokens"], first.expand(4, -1))


def test_parts_of_a_batch_are_the_same_step(run: Any, tmp_path: Path) -> None:
    settings = {"cache_dtype": "float32", "batch_size": 4, "steps": 2, "probe_size": 0, "max_grad_norm": 1e9}
    for size in (None, 2):
        run(output=str(size), row_chunk=size, **settings)
    whole = metrics(tmp_path / "None")
    assert whole[0]["grad_norm"] > 1e-4
    for one, other in zip(metrics(tmp_path / "2"), whole, strict=True):
        for name in ("loss", "mse", "contrastive", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_the_gradient_of_parts_is_that_of_the_whole() -> None:
    """In float64, without an optimiser."""
    pipeline = tiny_pipeline("sd15")
    unet = pipeline.unet.double().requires_grad_(False)
    tokens = SoftTokens.initial(unet, torch.Generator().manual_seed(0), stages=["down", "up"]).double()
    x, c = torch.randn(4, 4, 8, 8, dtype=torch.float64), torch.randn(4, 6, 32, dtype=torch.float64)
    with torch.no_grad():
        tokens.tokens.mul_(50)
    gradients = []
    for size in (4, 2, 1):
        tokens.zero_grad()
        with tokens.attach(unet):
            for rows in torch.arange(4).split(size):
                said = unet(x[rows].repeat(4, 1, 1, 1), 500, c.repeat_interleave(size, 0)).sample
                errors = denoising_matrix(said, 0.9 * said[:size].detach())
                (softrepa_loss(errors, targets=rows, denoising_weight=10.0).loss * size / 4).backward()
        gradients.append(tokens.tokens.grad.clone())
    assert gradients[0].abs().max() > 1e-6
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-14)


def test_a_run_killed_between_checkpoints_ends_as_the_undisturbed_one(run: Any, tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    class Dying(SoftREPATrainer):
        def update(self, batches: Any) -> dict[str, float]:
            if self.step == 3:
                raise KilledError
            return super().update(batches)

    settings = {"caption_bank": 1, "random_flip": True, "ema_decay": 0.9, "patience": 9, "row_chunk": 1}
    run(output="whole", **settings)
    with pytest.raises(KilledError):
        run(output="broken", trainer=Dying, **settings)
    assert run(output="broken", **settings).resumed_from == 2
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    one, other = saved(tmp_path / "whole"), saved(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "whole" / "best" / "soft_tokens.safetensors").is_file()
    with pytest.raises(InputError, match=r"temperature 0\.07 -> 0\.1"):
        run(output="whole", temperature=0.1, **settings)


def test_cached_and_uncached_runs_are_equal(run: Any, tmp_path: Path) -> None:
    run(output="cached", steps=2, caption_bank=2)
    run(output="uncached", steps=2, caption_bank=2, cache=False)
    assert metrics(tmp_path / "cached") == metrics(tmp_path / "uncached")


def test_a_caption_bank_serves_a_batch_of_one(run: Any) -> None:
    report = run(batch_size=1, caption_bank=3, steps=3, denoising_weight=0.0)
    losses = [row["loss"] for row in metrics(report.output) if row["step"]]
    assert all(0 < loss < 4 + math.log(4) for loss in losses)
    assert run(output="more", batch_size=1, caption_bank=99, steps=1).step == 1  # as many as there are


def test_a_dry_run_of_every_family(run: Any) -> None:
    for family in ("sd3", "sdxl"):
        report = run(output=family, model=f"tiny:{family}", dry_run=True, layers=5, batch_size=4)
        assert report.step == 4
        assert SoftTokens.load(report.exported[0]).layers == (2 if family == "sd3" else 1)


def test_settings_of_loras_are_told_to_mean_nothing(run: Any) -> None:
    assert run(rank=4, dora=True, steps=1).warnings[0] == "rank and dora are of LoRAs: soft tokens have none"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"batch_size": 1}, "batch_size is 1, which leaves no other caption"),
        ({"row_chunk": 2}, "row_chunk 2 does not divide batch_size 3"),
        ({"row_chunk": 1, "symmetric": True}, "symmetric needs all images of a batch at once, not 1"),
        ({"caption_dropout": 0.1}, "caption_dropout takes away"),
        ({"probe_size": 1}, "probe_size is 1"),
        ({"probe_size": 0, "patience": 2}, "patience goes by held-out pairs"),
        ({"probe_size": 8}, "too few to hold out 8 different ones"),
        ({"stages": ["left"]}, "stages has 'left'"),
        ({"model": "tiny:flux"}, "is a flux pipeline; this method trains SDXL and SD 1.5 and SD 3"),
        ({"model": "tiny:sd3", "resolution": 72}, "resolution 72 is not a multiple of 16"),
        ({"model": "tiny:sd3"}, "layers is 5, but the model has 2 blocks"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], wanted: str, run: Any) -> None:
    with pytest.raises(InputError, match=wanted):
        run(**settings)
    with pytest.raises(InputError, match="adaptation is 'lora'"):
        SoftREPAConfig(adaptation="lora")  # type: ignore[arg-type]


def test_it_says_when_to_stop_and_ends_by_patience(run: Any, tmp_path: Path) -> None:
    """A trainer whose held-out accuracy goes up and down by decree."""
    accuracies = iter([0.5, 0.8, 0.78, 0.6])

    class Watched(SoftREPATrainer):
        def _look_at(self, pairs: Any) -> Any:
            assert len(pairs) == 2
            value = torch.tensor([next(accuracies)])
            names = ("match_accuracy", "pair_accuracy", "mse", "loss")
            return iter([dict.fromkeys(names, value)])

    report = run(trainer=Watched, probe_every=1, steps=5, patience=2, checkpoint_every=100)
    assert report.step == 3
    assert report.ended is not None
    assert "best at step 1 (80%) and not better in 2 looks" in report.ended
    falling, drifting, end = report.warnings if len(report.warnings) == 3 else (*report.warnings, "", "")[:3]
    assert any("in 60%, after 80% at step 1" in warning for warning in (falling, drifting, end))
    best = load_file(report.output / "best" / "soft_tokens.safetensors")
    assert not torch.equal(best["tokens"], saved(report.output)["tokens"])


@pytest.mark.slow
def test_tokens_raise_the_accuracy_of_pairs_they_were_not_trained_on(
    photos: Path, captions: list[dict[str, Any]], bundled: Any
) -> None:
    """Real photographs and captions, and an MMDiT that knows them, but heeds the text only after states of one kind.

    It is trained with its captions where these states stand before the text, and with any captions where they do not.
    Soft tokens of half of the pairs have to find such states.
    """
    torch.manual_seed(0)
    count, generator = 16, torch.Generator().manual_seed(0)
    files = [Image.open(photos / row["file"]).convert("RGB").resize((8, 8)) for row in captions[:count]]
    x = torch.stack([torch.from_numpy(np.array(file)).permute(2, 0, 1) / 127.5 - 1 for file in files])
    x = (x - x.mean(0)) / x.std()
    text = torch.as_tensor(bundled.encode_texts([row["captions"][0] for row in captions[:count]]))
    text = ((text - text.mean(0)) / text.std())[:, None]
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=text.shape[-1], caption_projection_dim=64,
        pooled_projection_dim=8, pos_embed_max_size=4,
    )  # fmt: skip
    denoiser = FlowDenoiser(model, {"num_train_timesteps": 1000})

    def batch(rows: torch.Tensor, texts: torch.Tensor, times: torch.Tensor, noise: torch.Tensor) -> Batch:
        return Batch([""] * len(rows), x[rows], noise, times, Conditioning(text[texts], torch.zeros(len(rows), 8)))

    states = SoftTokens(torch.randn(2, 4, 64, generator=generator)).requires_grad_(False)
    everyone = torch.arange(count)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 2e-3 if step < 300 else 5e-4
        texts = torch.randint(count, (count,), generator=generator) if step % 2 else everyone
        times, noise = torch.randint(1000, (count,), generator=generator), torch.randn(x.shape, generator=generator)
        given = batch(everyone, texts, times, noise)
        with contextlib.nullcontext() if step % 2 else states.attach(model):
            (denoiser.predict(given) - denoiser.target(given)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)

    def errors(rows: torch.Tensor, time: int, seed: int) -> torch.Tensor:
        noise = torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(seed)).expand(len(rows), -1, -1, -1)
        images = batch(rows, rows, torch.full((len(rows),), time), noise)
        return denoising_matrix(denoiser.predict(grid_of(images, images.conditioning)), denoiser.target(images))

    @torch.no_grad()
    def accuracies(rows: torch.Tensor) -> tuple[float, float]:
        """Top-1, and share of wrong captions with a larger error; chance is 1 / 8 and 1 / 2."""
        found = torch.stack([errors(rows, time, 1000 + time) for time in (125, 375, 625, 875)])
        own = found.diagonal(dim1=1, dim2=2)[:, :, None]
        larger = (found > own).float().sum(2) / (len(rows) - 1)
        return float((larger == 1).float().mean()), float(larger.mean())

    trained, held_out = everyone[: count // 2], everyone[count // 2 :]
    start = accuracies(held_out)
    tokens = SoftTokens.initial(model, torch.Generator().manual_seed(1), layers=2)
    optimizer = torch.optim.AdamW(tokens.parameters(), lr=3e-2)
    losses = []
    with tokens.attach(model):
        for step in range(100):
            rows = trained[torch.randperm(len(trained), generator=generator)[:4]]
            loss = softrepa_loss(errors(rows, int(torch.randint(1000, (), generator=generator)), step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        end = accuracies(held_out)
    assert sum(losses[-40:]) < sum(losses[:40])
    assert end[0] > start[0] + 0.2
    assert end[1] > start[1] + 0.1
    assert accuracies(held_out) == start
