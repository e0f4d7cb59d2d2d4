"""python scripts/bench_query_perturbation.py [--batch 4] [--objects 3] [--device cpu]: what query perturbation costs.

A forward pass of each family without and with objects in every image, the first box a third of the image wide, the
others smaller. Models have their real sizes and random weights; BLIP-2's image tower is ViT-B/14 instead of ViT-g,
which makes its Q-Former, where the work is, weigh more than it does in the real one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from mmalign.object_aware.perturbing import grid_of, perturbed
from mmalign.query_perturbation import token_weights

TARGET = 1.3


def open_clip_model(name: str) -> SimpleNamespace:
    import open_clip

    model = open_clip.create_model(name)
    return SimpleNamespace(model=model, image_features=lambda pixels: model.encode_image(pixels))


def clip() -> SimpleNamespace:
    import transformers

    model = transformers.CLIPModel(transformers.CLIPConfig())  # its defaults are those of ViT-B/32
    return SimpleNamespace(model=model, image_features=lambda pixels: model.get_image_features(pixel_values=pixels))


def siglip() -> SimpleNamespace:
    import transformers

    model = transformers.SiglipModel(transformers.SiglipConfig())  # those of base-patch16-224
    return SimpleNamespace(model=model, image_features=lambda pixels: model.get_image_features(pixel_values=pixels))


def blip2() -> SimpleNamespace:
    import transformers

    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "initializer_range": 0.02,  # by default 1e-10, which makes all keys equal
    }
    qformer = {"encoder_hidden_size": 768, "use_qformer_text_input": True, "vocab_size": 30523}
    config = transformers.Blip2Config(vision_config=vision, qformer_config=qformer)
    model = transformers.Blip2ForImageTextRetrieval(config)
    torch.nn.init.normal_(model.query_tokens, std=0.02)

    def image_features(pixels: Tensor) -> Tensor:
        states = model.vision_model(pixel_values=pixels).last_hidden_state
        queries = model.query_tokens.expand(len(states), -1, -1)
        return model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state

    return SimpleNamespace(model=model, image_features=image_features)


FAMILIES: dict[str, Callable[[], SimpleNamespace]] = {
    "CLIP ViT-B/32, open_clip": lambda: open_clip_model("ViT-B-32"),
    "CLIP ViT-B/32, transformers": clip,
    "SigLIP B/16-224, open_clip": lambda: open_clip_model("ViT-B-16-SigLIP"),
    "SigLIP B/16-224, transformers": siglip,
    "CoCa ViT-B/32, open_clip": lambda: open_clip_model("coca_ViT-B-32"),
    "BLIP-2, ViT-B/14, transformers": blip2,
}


def objects_of(encoder: SimpleNamespace, batch: int, objects: int) -> tuple[Tensor, Tensor]:
    """Pixels in the encoder's size, and token weights."""
    grid = grid_of(encoder)
    height, width = grid.rows * grid.patch_height, grid.columns * grid.patch_width
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(batch):
        sides = torch.tensor([1 / 3, *[0.15] * (objects - 1)])[:, None] * torch.tensor([width, height])
        corners = torch.rand(objects, 2, generator=generator) * (torch.tensor([width, height]) - sides)
        rows.append(token_weights(torch.cat([corners, corners + sides], dim=1), grid))
    return torch.randn(batch, 3, height, width, generator=generator), torch.stack(rows)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def measure(encoder: SimpleNamespace, batch: int, objects: int, repeats: int, device: torch.device) -> tuple:
    """Medians of passes that take turns, and the median of their ratios."""
    encoder.model.eval().to(device)
    pixels, weights = (part.to(device) for part in objects_of(encoder, batch, objects))

    def within() -> None:
        with perturbed(encoder, weights):
            encoder.image_features(pixels)

    for call in (lambda: encoder.image_features(pixels), within):
        call()
    pairs = [
        (milliseconds(lambda: encoder.image_features(pixels), device), milliseconds(within, device))
        for _ in range(repeats)
    ]
    plain, found = zip(*pairs, strict=True)
    return statistics.median(plain), statistics.median(found), statistics.median(b / a for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--objects", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.batch} images, {options.objects} objects each, float32, {where}; target {TARGET} x")
    for name, build in FAMILIES.items():
        with torch.inference_mode():
            plain, found, ratio = measure(build(), options.batch, options.objects, options.repeats, device)
        verdict = "" if ratio <= TARGET else "   above the target"
        print(f"  {name:<32}{plain:9.1f} ms {found:9.1f} ms   {ratio:5.2f} x{verdict}", flush=True)


if __name__ == "__main__":
    main()
