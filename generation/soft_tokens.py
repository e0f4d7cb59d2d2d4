"""Soft tokens: a few learned vectors among the text states of a frozen denoiser, SoftREPA (arXiv 2503.08250).

An MMDiT gets its own tokens before each of its first blocks, prepended to the text and dropped again after the block;
a UNet gets one set, inserted after the first text token in some of its stages. All of it by hooks on diffusers' own
modules, which are as they were once the hooks are gone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.checks import at_least
from mmalign.errors import InputError, reason_of
from mmalign.files import save_tensors, whole_file

from .pipelines import denoiser_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SOFT_TOKENS_FILE", "STAGES", "Attachment", "SoftTokens", "holds_soft_tokens", "soft_tokens_applied"]

SOFT_TOKENS_FILE = "soft_tokens.safetensors"
STAGES = ("down", "mid", "up")
_FORMAT = "mmalign soft tokens 1"
_NAMES = {"tokens"}, {"tokens", "time_table"}
_BUCKETS, _TIMES = 100, 1000
_SPREAD = 0.02
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_MMDIT, _UNET = "SD3Transformer2DModel", "UNet2DConditionModel"


@contextlib.contextmanager
def soft_tokens_applied(
    pipeline: DiffusionPipeline, tokens: SoftTokens | str | os.PathLike[str]
) -> Iterator[DiffusionPipeline]:
    """Within the block any diffusers pipeline draws with soft tokens, in every branch of its guidance.

    Image-to-image, inpainting and other pipelines of text-guided editing as well, as long as their denoiser is SD3's
    or a UNet of Stable Diffusion: `with soft_tokens_applied(pipeline, "runs/softrepa/export"): pipeline(...)`.
    `generation.generate` takes the file as an adapter.

    Args:
        pipeline: used as it is; afterwards it is what it was, bit for bit.
        tokens: loaded ones, or whatever `find_adapter` finds the file by.

    Raises:
        InputError: the tokens cannot be read, or are of another model.
        ModelUnavailableError: they are on the hub and cannot be fetched.
    """
    if not isinstance(tokens, SoftTokens):
        from .adapters import find_adapter

        tokens = SoftTokens.load(find_adapter(tokens).file)
    with tokens.attach(denoiser_of(pipeline)[1]):
        yield pipeline


class SoftTokens(nn.Module):
    """The tokens, and their shift by the timestep where there is one.

    Before block k at timestep t an MMDiT's text states become [tokens[k] + time_table[bucket(t)][k]; text], and after
    it they lose these again. In the enabled stages of a UNet they are [text[0]; tokens + time_table[bucket(t)];
    text[1:]]. bucket(t) = floor(t / 10) for 100 buckets, at most the last: SD3 samples from t = 1000 on. Only text
    states get tokens; pooled embeddings and size conditioning do not. The empty prompt of guidance gets them, too.

    Attributes:
        tokens: one set a block, or one for all stages.
        time_table: a row for each of equally wide ranges of timesteps; block k has the k-th part of it.
        stages: of a UNet, those that see the tokens; none for an MMDiT.
    """

    tokens: nn.Parameter
    time_table: nn.Parameter | None

    def __init__(
        self,
        tokens: Float[Tensor, "layers m width"] | Float[Tensor, "m width"],
        time_table: Float[Tensor, "buckets layers*width"] | None = None,
        *,
        stages: Sequence[str] = ("down",),
    ) -> None:
        """Tokens with three axes are prepended in an MMDiT, those with two are inserted in a UNet.

        Raises:
            InputError: shapes that do not go together, or stages that are none.
        """
        super().__init__()
        width = tokens.shape[-1] * (tokens.shape[0] if tokens.ndim == 3 else 1)
        if tokens.ndim not in (2, 3) or not tokens.numel():
            raise InputError(f"soft tokens have the shape {tuple(tokens.shape)}; give (layers, m, width) or (m, width)")
        if time_table is not None and (time_table.ndim != 2 or time_table.shape[1] != width or not len(time_table)):
            shape = tuple(time_table.shape)
            raise InputError(f"the time table has the shape {shape}; tokens {tuple(tokens.shape)} need (n, {width})")
        unknown = [stage for stage in stages if stage not in STAGES]
        if tokens.ndim == 2 and (unknown or not stages):
            raise InputError(f"stages are {list(stages)!r}; give some of {', '.join(STAGES)}")
        self.tokens = nn.Parameter(tokens.clone())
        self.time_table = None if time_table is None else nn.Parameter(time_table.clone())
        self.stages = tuple(stage for stage in STAGES if stage in stages) if tokens.ndim == 2 else ()

    @classmethod
    def initial(
        cls,
        network: nn.Module,
        generator: torch.Generator,
        *,
        count: int = 4,
        layers: int = 5,
        time_table: bool | None = None,
        stages: Sequence[str] | None = None,
        start: Float[Tensor, " width"] | None = None,
    ) -> SoftTokens:
        """Untrained float32 tokens for a denoiser, as the released code begins with them; on the CPU.

        Args:
            network: SD3's transformer or a UNet; only its configuration is looked at.
            generator: of the normal distribution with standard deviation 0.02; a CPU one.
            count: tokens of a set (m).
            layers: blocks of an MMDiT that get a set; for a UNet it means nothing.
            time_table: shift the tokens by the timestep, with 100 buckets; by default for all but SDXL.
            stages: of a UNet; by default down, and for SDXL down and mid.
            start: what every token begins at instead, such as the first state of the empty prompt (SD 1.5).

        Raises:
            InputError: another kind of network, or more layers than it has blocks.
        """
        at_least("count", count)
        at_least("layers", layers)
        kind, width, blocks = _anatomy(network)
        if kind == _MMDIT and layers > blocks:
            raise InputError(f"layers is {layers}, but the model has {blocks} blocks; give {blocks} at most")
        shape = (layers, count, width) if kind == _MMDIT else (count, width)
        xl = kind == _UNET and _config(network, "addition_embed_type") == "text_time"
        tokens = torch.randn(shape, generator=generator) * _SPREAD
        if start is not None:
            tokens = start.float().expand(shape).clone()
        table = None
        if (not xl) if time_table is None else time_table:
            table = torch.randn(_BUCKETS, width * (layers if kind == _MMDIT else 1), generator=generator) * _SPREAD
        return cls(tokens, table, stages=(("down", "mid") if xl else ("down",)) if stages is None else stages)

    @property
    def placement(self) -> str:
        """Where the text gets them: "prepend" in an MMDiT, "after-bos" in a UNet."""
        return "prepend" if self.tokens.ndim == 3 else "after-bos"

    @property
    def layers(self) -> int:
        """Sets of tokens: blocks of an MMDiT, 1 for a UNet."""
        return len(self.tokens) if self.tokens.ndim == 3 else 1

    @property
    def count(self) -> int:
        """Tokens of a set."""
        return self.tokens.shape[-2]

    def at(self, timesteps: Float[Tensor, " n"], layer: int = 0) -> Float[Tensor, "1|n m width"]:
        """What is inserted in block `layer`; one row for all if it is the same for every timestep."""
        tokens = self.tokens[layer] if self.tokens.ndim == 3 else self.tokens
        table = self.time_table
        if table is None:
            return tokens[None]
        width, buckets = tokens.shape[-1], len(table)
        rows = (timesteps.to(table.device).long() * buckets // _TIMES).clamp(0, buckets - 1)
        return tokens + table[:, layer * width : (layer + 1) * width][rows][:, None]

    def attach(self, network: nn.Module) -> Attachment:
        """Put the tokens into a denoiser until the result is removed, or its `with` block left.

        Gradients reach the tokens, also with gradient checkpointing. They are used on the network's device and, after
        their sum was taken in their own precision, in that of its text states. Other adapters are not touched, and
        several sets of tokens go together.

        Args:
            network: diffusers' `SD3Transformer2DModel`, or `UNet2DConditionModel` with attention to text.

        Raises:
            InputError: another kind of network, or one that the tokens are not made for.
        """
        return Attachment(self, network)

    def save(self, path: str | os.PathLike[str], notes: Mapping[str, str] | None = None) -> Path:
        """Write safetensors with metadata that say all the rest; whole or not at all.

        Args:
            path: of the file.
            notes: further metadata.

        Raises:
            InputError: values that are not finite, or a place that cannot be written to.
        """
        tensors = dict(self.named_parameters(recurse=False))
        for name, value in tensors.items():
            if not value.isfinite().all():
                raise InputError(
                    f"{name} of the soft tokens holds values that are not finite, so nothing was written: training has "
                    "diverged; take an earlier checkpoint"
                )
        about = {
            "format": _FORMAT,
            "placement": self.placement,
            "n_layers": str(self.layers),
            "m": str(self.count),
            "buckets": str(0 if self.time_table is None else len(self.time_table)),
            "stages": ",".join(self.stages),
        }
        with whole_file(path, durable=True) as fresh:
            save_tensors(tensors, fresh, {**(notes or {}), **about})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SoftTokens:
        """Read what `save` wrote, or the tensors of the released tokens as safetensors.

        Those have no metadata: tokens (layers, m, width) for SD3, (m, width) for UNets, and a table (100, layers *
        width), by whatever name. Stages follow from the width: down, for SDXL's 2048 down and mid.

        Raises:
            InputError: no such file, a damaged one, a pickle, or one that holds something else.
        """
        tensors, about = _read(Path(path))
        if about.get("format") == _FORMAT:
            stages: Sequence[str] = about.get("stages", "").split(",")
        else:
            tensors = _released(Path(path), tensors)
            stages = ("down", "mid") if tensors["tokens"].shape[-1] == 2048 else ("down",)
        if set(tensors) not in _NAMES:
            raise InputError(
                f"{os.fspath(path)!r} holds {', '.join(sorted(tensors)[:3])}, not soft tokens; give others"
            )
        return cls(tensors["tokens"], tensors.get("time_table"), stages=stages)


class Attachment:
    """Soft tokens in a network, until `remove` or the end of a `with` block."""

    def __init__(self, tokens: SoftTokens, network: nn.Module) -> None:
        self._tokens, self._hooks = tokens, list[Any]()
        kind, width, blocks = _anatomy(network)
        wanted = "prepend" if kind == _MMDIT else "after-bos"
        if tokens.placement != wanted:
            made = "a UNet" if kind == _MMDIT else "SD3"
            raise InputError(f"the soft tokens are made for {made}, and this model is a {kind}; give its own")
        if tokens.tokens.shape[-1] != width:
            raise InputError(
                f"the soft tokens are {tokens.tokens.shape[-1]} wide, and this model's text states {width}; give "
                "tokens that were made for it"
            )
        if kind == _MMDIT and tokens.layers > blocks:
            raise InputError(
                f"the soft tokens are for {tokens.layers} blocks, and this model has {blocks}; give others"
            )
        if kind == _MMDIT:
            self._prepend(network)
        else:
            self._insert(network)

    def remove(self) -> None:
        """Leave the network as it was; again does nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _prepend(self, network: Any) -> None:
        """The timestep goes with the call: under gradient checkpointing a block runs again when others have passed."""
        key = f"soft_token_timesteps_{id(self)}"
        before: Callable[..., Any]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            arguments = _Arguments(args, kwargs)
            times = arguments.get("timestep", 3)
            options = {**(arguments.get("joint_attention_kwargs", 5) or {}), key: times}
            return arguments.put("joint_attention_kwargs", 5, options)

        def prepend(layer: int) -> Callable[..., Any]:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
                arguments = _Arguments(args, kwargs)
                options = dict(arguments.get("joint_attention_kwargs", 3))
                times = options.pop(key)
                args, kwargs = arguments.put("joint_attention_kwargs", 3, options or None)
                if layer >= self._tokens.layers:
                    return args, kwargs
                arguments = _Arguments(args, kwargs)
                text = arguments.get("encoder_hidden_states", 1)
                return arguments.put("encoder_hidden_states", 1, torch.cat([self._soft(times, text, layer), text], 1))

            return before

        def drop(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, Any]) -> tuple[Any, Any]:
            text, image = output
            return (None if text is None else text[:, self._tokens.count :]), image  # the last block gives no text

        self._hooks.append(network.register_forward_pre_hook(enter, with_kwargs=True))
        for layer, block in enumerate(network.transformer_blocks):
            before = prepend(layer)
            self._hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
            if layer < self._tokens.layers:
                self._hooks.append(block.register_forward_hook(drop))

    def _insert(self, network: Any) -> None:
        """Stages run once a call, as a UNet's checkpoints lie within them."""
        times: Any = None

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal times
            times = _Arguments(args, kwargs).get("timestep", 1)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            if kwargs.get("encoder_hidden_states") is None:
                return None  # a stage that does not look at the text
            states = kwargs["encoder_hidden_states"]
            text, *images = states if isinstance(states, tuple) else (states,)  # an IP-Adapter's images stay
            text = torch.cat([text[:, :1], self._soft(times, text), text[:, 1:]], 1)
            changed = {"encoder_hidden_states": (text, *images) if images else text}
            if (bias := kwargs.get("encoder_attention_mask")) is not None:  # added to scores: 0 where text is seen
                seen = torch.zeros_like(bias[..., :1]).expand(*bias.shape[:-1], self._tokens.count)
                changed["encoder_attention_mask"] = torch.cat([bias[..., :1], seen, bias[..., 1:]], -1)
            return args, kwargs | changed

        blocks = {"down": network.down_blocks, "mid": [network.mid_block], "up": network.up_blocks}
        self._hooks.append(network.register_forward_pre_hook(enter, with_kwargs=True))
        for stage in self._tokens.stages:
            for block in blocks[stage]:
                if block is not None:
                    self._hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))

    def _soft(self, times: Any, text: Float[Tensor, "n tokens width"], layer: int = 0) -> Float[Tensor, "n m width"]:
        found = self._tokens.at(torch.as_tensor(times).reshape(-1), layer).to(text.device, text.dtype)
        return found.expand(len(text), -1, -1)


class _Arguments:
    """A call's arguments, which come by place or by name."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs

    def get(self, name: str, place: int) -> Any:
        return self._args[place] if place < len(self._args) else self._kwargs.get(name)

    def put(self, name: str, place: int, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if place < len(self._args):
            return (*self._args[:place], value, *self._args[place + 1 :]), self._kwargs
        return self._args, self._kwargs | {name: value}


def holds_soft_tokens(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file says that it holds soft tokens, or has tensors of just their names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT or set(file.keys()) in _NAMES
    except (OSError, SafetensorError):
        return False  # whoever reads it says why


def _anatomy(network: nn.Module) -> tuple[str, int, int]:
    """Kind of a denoiser, width of the text states in its blocks, and the number of blocks (of an MMDiT).

    Raises:
        InputError: a kind that soft tokens are not known for.
    """
    kind = _config(network, "_class_name") or type(network).__name__
    if kind == _MMDIT:
        return kind, _config(network, "caption_projection_dim"), _config(network, "num_layers")
    if kind == _UNET:
        width = _config(network, "cross_attention_dim")
        widths = set(width) if isinstance(width, list | tuple) else {width}
        if len(widths) == 1 and None not in widths:
            return kind, widths.pop(), 0
        raise InputError("this UNet's stages differ in the width of their text states; soft tokens need one width")
    why = ": its text has places that would shift" if kind.startswith("Flux") else ""
    raise InputError(f"soft tokens are not known for {kind}{why}; use SD 3, or a UNet of SD 1.5 or SDXL")


def _config(network: nn.Module, name: str) -> Any:
    return getattr(network, "config", {}).get(name)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in _PICKLES:
        raise InputError(
            f"{str(path)!r} is a pickle, which can run code when read, so it is not; where you trust it, convert it: "
            'safetensors.torch.save_file({"tokens": ..., "time_table": ...}, "soft_tokens.safetensors")'
        )
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"soft tokens {str(path)!r} cannot be read ({reason_of(error)}); give a .safetensors file of them"
        ) from None


def _released(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tokens and table by their shapes: the tokens are those with three axes, or else with fewer rows."""
    ordered = sorted(tensors.values(), key=lambda tensor: (-tensor.ndim, tensor.shape[0] if tensor.ndim else 0))
    fits = len(ordered) in (1, 2) and ordered[0].ndim in (2, 3) and ordered[0].shape[-2] < _BUCKETS
    fits = fits and all(tensor.ndim == 2 and len(tensor) == _BUCKETS for tensor in ordered[1:])
    if not fits:
        raise InputError(
            f"{str(path)!r} holds no soft tokens (they are one tensor, or two with a table of {_BUCKETS} rows); give "
            "a file that was saved as such"
        )
    return {name: tensor.float() for name, tensor in zip(("tokens", "time_table"), ordered, strict=False)}
