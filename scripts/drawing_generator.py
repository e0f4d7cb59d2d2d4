"""python scripts/drawing_generator.py OUTPUT [--minutes 20] [--concepts 100] [--seed 0]

Trains a Stable Diffusion 1.5 in miniature on tests/data/drawings.zip, on one CPU thread and without a hub: it draws
64 x 64 pixel emoji of animals, fruit and things that really look like their names, each in two styles, so that reward
fine-tuning and best-of-N selection have something to improve.

A third of the time goes to the VAE (all emoji but 100 kept to measure it on), the rest to UNet and text encoder (the
concepts that the bundled encoder recognises best in both styles). `OUTPUT` becomes a folder for
`generation.load_pipeline`, with concepts.txt (a prompt a line), samples.png and about.json. A run that was stopped goes
on from OUTPUT.work, where it is at most a minute back.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign import load_encoder
from mmalign.files import whole_file, whole_folder
from mmalign.imaging import read_image
from mmalign.imaging.contact_sheet import draw_contact_sheet
from mmalign.pairs import read_captioned

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

DATA = Path(__file__).parent.parent / "tests" / "data" / "drawings.zip"
SIDE, HELD_OUT, VAE_SHARE, CAPTION_DROPOUT = 64, 100, 0.35, 0.12
TEXT_WIDTH, TEXT_LENGTH = 96, 24
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt
# Signs, gestures and faces are all alike at 64 pixels; of others the name says what is meant, not what is seen.
UNNAMEABLE = re.compile(
    r"\b(arrival|arrow|baby|book|bowling|boy|button|cats|child|circle|circled|classical|claus|compass|"
    r"construction|control|cross|crying|dash|decreasing|departure|derelict|done|envelope|exclamation|face|"
    r"finger|fingers|fist|flag|flags|girl|grinning|hand|hands|heart|hearts|hook|hotel|increasing|input|kissing|"
    r"knot|ledger|locked|man|mark|men|mouth|no|office|oncoming|package|pedestrians|people|person|petri|pill|"
    r"pouting|restroom|room|sake|salt|sign|square|stadium|station|suit|symbol|tennis|thirty|timer|trays|"
    r"trident|unlocked|vulcan|weary|woman|women|worker)\b"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=20, help="of training; choosing and sampling take 3 more")
    parser.add_argument("--concepts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    work = given.output.with_name(given.output.name + ".work")
    drawings = emoji(work)
    concepts = chosen(drawings, given.concepts, work)
    print(f"{len(concepts)} concepts: {', '.join(concepts)}", flush=True)

    others = sorted(set(drawings) - set(concepts))
    held_out = {others[row] for row in torch.randperm(len(others))[:HELD_OUT].tolist()}
    known = torch.stack([image for name in concepts for image in drawings[name].values()])
    rest = [image for name in others if name not in held_out for image in drawings[name].values()]
    unseen = torch.stack([image for name in sorted(held_out) for image in drawings[name].values()])
    vae = make_vae()
    vae_seconds = train_vae(vae, known, torch.stack(rest), given.minutes * VAE_SHARE, work)
    latents = standardise(vae, known)
    quality = {"concepts": psnr(vae, known), "held_out": psnr(vae, unseen)}
    print(f"VAE: PSNR {quality['held_out']:.1f} dB on held-out drawings, {quality['concepts']:.1f} on the concepts")

    tokenizer = make_tokenizer(concepts)
    text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    captions = [(name, prompt_of(name)) for name in concepts for _ in drawings[name]]
    seconds = train_unet(unet, text_encoder, tokenizer, latents, captions, given.minutes * (1 - VAE_SHARE), work)
    pipeline = assemble(vae, unet, text_encoder, tokenizer)
    about = {
        "parameters": {name: weights(part) for name, part in
                       (("unet", unet), ("vae", vae), ("text_encoder", text_encoder))},
        "seconds": {"vae": round(vae_seconds), "unet": round(seconds)},
        "concepts": len(concepts),
        "drawings": len(known),
        "seed": given.seed,
        "vae_psnr": quality,
    }  # fmt: skip
    save(pipeline, concepts, about, given.output)


def keep_memory() -> None:
    """Have glibc keep freed memory: returned and faulted in again at each step, it costs up to half of the time."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def prompt_of(name: str) -> str:
    return f"a drawing of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def emoji(work: Path) -> dict[str, dict[str, Float[Tensor, "3 64 64"]]]:
    """Name to style to pixels in [-1, 1] on white, for the emoji that there are in both styles."""
    if not (work / "data" / "captions.jsonl").is_file():
        with whole_folder(work / "data") as fresh, zipfile.ZipFile(DATA) as packed:
            packed.extractall(fresh)
    found: dict[str, dict[str, Tensor]] = {}
    lines, folder = read_captioned(work / "data")
    for line in lines:
        if line.file.startswith("emoji/"):
            pixels = read_image(folder / line.file).pixels[None].float() / 127.5 - 1
            small = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)[0]
            found.setdefault(line.captions[0].split(":")[0], {})[line.file.split("/")[1]] = small
    return {name: styles for name, styles in found.items() if len(styles) == 2}


def chosen(drawings: dict[str, dict[str, Tensor]], count: int, work: Path) -> list[str]:
    """The names whose drawings the bundled encoder tells best from the others', sorted."""
    names = sorted(
        name for name in drawings
        if re.fullmatch("[a-z-]+( [a-z-]+)?", name) and not UNNAMEABLE.search(name)
    )  # fmt: skip
    cache = work / "scores.json"
    if not cache.is_file():
        encoder = load_encoder("bundled", device="cpu")
        texts = torch.as_tensor(encoder.encode_texts([prompt_of(name) for name in names]))
        margins = []
        for style in ("noto", "fluent"):
            pictures = [(drawings[name][style] + 1) / 2 for name in names]
            scores = torch.as_tensor(encoder.encode_images(pictures)) @ texts.T
            margins.append(scores.diagonal() - scores.mean(1) - scores.mean(0))
        with whole_file(cache) as fresh:
            fresh.write_text(json.dumps(dict(zip(names, torch.minimum(*margins).tolist(), strict=True)), indent=1))
    scores = json.loads(cache.read_text())
    return sorted(sorted(names, key=lambda name: -scores[name])[:count])


def make_vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    channels = (16, 32, 48)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=SIDE,
        force_upcast=False,
    )


def train_vae(vae: AutoencoderKL, known: Tensor, rest: Tensor, minutes: float, work: Path) -> float:
    """L1, again at quarter size, squared differences of colours, KL; half of each batch are drawings of concepts.

    L1 alone leaves green and red the same brown for as long as this training takes.
    """

    def loss_of(step: int) -> Tensor:
        rows = [images[torch.randint(len(images), (4,))] for images in (known, rest)]
        images = torch.cat(rows)
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            drawn = vae.decode(posterior.sample()).sample.float()
        error = drawn - images
        coarse = F.avg_pool2d(error, 4).abs().mean()
        colour = F.avg_pool2d(error - error.roll(1, 1), 4).square().mean()
        divergence = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return error.abs().mean() + coarse + 3 * colour + 1e-4 * divergence

    return fit("vae", nn.ModuleDict({"vae": vae}), loss_of, minutes, 2e-3, 0.995, work)


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents of `images` as the UNet sees them: each channel with mean 0 and variance 1.

    Means and ratios of the channels go into the VAE's outer 1 x 1 convolutions, since Stable Diffusion 1.5 knows one
    scaling factor only and no shift.
    """
    raw = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(32)])
    mean, spread = raw.mean((0, 2, 3)), raw.std((0, 2, 3))
    overall = raw.std()
    inner, outer, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    outer.bias += (outer.weight[:, :, 0, 0] * mean).sum(1)
    outer.weight *= (spread / overall)[None, :, None, None]
    inner.weight[:channels] *= (overall / spread)[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) * overall / spread
    inner.bias[channels:] += 2 * (overall / spread).log()
    vae.register_to_config(scaling_factor=round(1 / overall.item(), 5))
    return (raw - mean[:, None, None]) / spread[:, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over images, in dB, of pixels in [0, 1]."""
    drawn = torch.cat([vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in images.split(32)])
    errors = ((drawn.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    return round(-10 * errors.log10().mean().item(), 2)


def make_tokenizer(concepts: list[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with those of its merges that the concepts' names and the first 500 pairs need."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    full = SimpleTokenizer()
    ranks = full.bpe_ranks
    used = set(list(ranks)[:500])
    for word in {word for name in concepts for word in (*name.replace("-", " ").split(), "drawing")}:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while known := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
            best = min(known, key=ranks.__getitem__)
            used.add(best)
            place = list(itertools.pairwise(pieces)).index(best)
            pieces[place : place + 2] = ["".join(best)]
    merges = [pair for pair in ranks if pair in used]
    symbols = [*list(full.encoder)[:512], *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: position for position, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", model_max_length=TEXT_LENGTH
    )  # fmt: skip


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    size = len(tokenizer)
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=TEXT_WIDTH,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    model = CLIPTextModel(config)
    # CLIP's own start, 0.02, is for a much longer training.
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    return model


def make_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # as in the full model, this is the number of heads
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
    )


def make_scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    captions: list[tuple[str, str]],
    minutes: float,
    work: Path,
) -> float:
    """Noise prediction, weighted by min-SNR with gamma 5 (arXiv 2303.09556)."""
    scheduler = make_scheduler()
    levels = scheduler.alphas_cumprod
    ratios = levels / (1 - levels)
    tokens = tokenizer(
        [text for pair in captions for text in pair], padding="max_length", return_tensors="pt"
    ).input_ids
    tokens = tokens.view(len(captions), 2, -1)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(latents), (32,))
        texts = tokens[rows, torch.randint(2, (len(rows),))]
        texts = torch.where(torch.rand(len(rows), 1) < CAPTION_DROPOUT, empty, texts)
        # One timestep from each of as many equal ranges: less noise in the gradient than independent ones.
        times = ((torch.arange(len(rows)) + torch.rand(len(rows))) * (1000 / len(rows))).long().clamp(max=999)
        noise = torch.randn_like(latents[rows])
        noisy = scheduler.add_noise(latents[rows], noise, times)
        predicted = unet(noisy, times, text_encoder(texts).last_hidden_state).sample
        share = (5 / ratios[times]).clamp(max=1)
        return (share * (predicted - noise).square().mean((1, 2, 3))).mean()

    parts = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    return fit("unet", parts, loss_of, minutes, 1.5e-3, 0.997, work)


def fit(
    name: str,
    parts: nn.ModuleDict,
    loss_of: Callable[[int], Tensor],
    minutes: float,
    rate: float,
    decay: float,
    work: Path,
) -> float:
    """Train for `minutes` with AdamW and a cosine, leave `parts` at the mean of their weights; seconds taken.

    Goes on from a state in `work`; one that is complete is only loaded.
    """
    path = work / f"{name}.pt"
    optimiser = torch.optim.AdamW(parts.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = {key: value.clone() for key, value in parts.state_dict().items()}
    step, before, mean_loss = 0, 0.0, 0.0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        parts.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
        average, step, before = state["average"], state["step"], state["seconds"]
    start, saved, told = time.perf_counter() - before, before, before
    parts.train()
    while (seconds := time.perf_counter() - start) < 60 * minutes:
        part = seconds / (60 * minutes)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        momentum = min(decay, step / (step + 10))
        with torch.no_grad():
            current = parts.state_dict()
            keys = [key for key in average if average[key].is_floating_point()]
            torch._foreach_lerp_([average[key] for key in keys], [current[key] for key in keys], 1 - momentum)
        mean_loss += (loss.item() - mean_loss) * max(0.01, 1 / step)
        if seconds - told > 20:
            told = seconds
            print(f"{name} {seconds:.0f} s, step {step}, loss {mean_loss:.4f}", flush=True)
        if seconds - saved > 60:
            saved = seconds
            keep(path, parts, optimiser, average, step, seconds)
    if seconds > saved:
        keep(path, parts, optimiser, average, step, seconds)
    parts.load_state_dict(average)
    parts.eval().requires_grad_(False)
    return seconds


def keep(
    path: Path,
    parts: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: dict[str, Tensor],
    step: int,
    seconds: float,
) -> None:
    state = {"weights": parts.state_dict(), "optimiser": optimiser.state_dict(), "average": average, "step": step}
    with whole_file(path) as fresh:
        torch.save({**state, "seconds": seconds}, fresh)


def assemble(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipeline: StableDiffusionPipeline, concepts: list[str], about: dict[str, Any], output: Path) -> None:
    """Measure and save the pipeline; the pictures are those of the float16 weights that are saved."""
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        part.half().float()
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt_of(name) for name in concepts]
    encoder = load_encoder("bundled", device="cpu")
    start = time.perf_counter()
    pictures: list[Any] = []
    for batch in range(0, len(prompts), 16):
        generators = [
            torch.Generator().manual_seed(1000 + batch + row) for row in range(len(prompts[batch : batch + 16]))
        ]
        pictures += draw(pipeline, prompts[batch : batch + 16], generators)
    seconds = time.perf_counter() - start
    scores = torch.as_tensor(encoder.encode_images(pictures)) @ torch.as_tensor(encoder.encode_texts(prompts)).T
    own = scores.diagonal()
    about["cosine_bundled"] = {
        "own_prompt": round(own.mean().item(), 4),
        "next_prompt": round(scores.roll(1, 1).diagonal().mean().item(), 4),
        "own_is_best_of_all": round((own >= scores.max(1).values).float().mean().item(), 3),
    }
    about["milliseconds"] = {
        "unet_batch_16": unet_time(pipeline),
        "picture_20_steps": round(1000 * seconds / len(prompts)),
    }
    rows = []
    for number in torch.linspace(0, len(prompts) - 1, 12).long().tolist():
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        rows.append((concepts[number], [(one, f"seed {seed}") for seed, one in
                                        enumerate(draw(pipeline, [prompts[number]] * 4, generators))]))  # fmt: skip
    with whole_folder(output) as fresh:
        pipeline.to(torch.float16)
        pipeline.save_pretrained(fresh)
        (fresh / "concepts.txt").write_text("\n".join(prompts) + "\n")
        (fresh / "about.json").write_text(json.dumps(about, indent=1))
        draw_contact_sheet(rows, fresh / "samples.png", cell=128)
    print(json.dumps(about, indent=1))


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], generators: list[torch.Generator]) -> list[Any]:
    return pipeline(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generators).images


@torch.no_grad()
def unet_time(pipeline: StableDiffusionPipeline) -> float:
    """Milliseconds of a call for 16 latents, the median of ten."""
    latents = torch.randn(16, pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
    texts, times = torch.randn(16, TEXT_LENGTH, TEXT_WIDTH), []
    for _ in range(10):
        start = time.perf_counter()
        pipeline.unet(latents, 500, texts)
        times.append(time.perf_counter() - start)
    return round(1000 * sorted(times)[5], 1)


if __name__ == "__main__":
    main()
