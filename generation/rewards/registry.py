"""From a spec string to a reward."""

from __future__ import annotations

import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from mmalign.errors import EncoderUnavailableError, InputError, reason_of

from .reward import AnyReward, Reward, as_reward
from .weighted_sum import WeightedSum

if TYPE_CHECKING:
    from mmalign.encoders import Encoder

__all__ = ["REWARDS", "Loader", "RewardSource", "load_reward", "load_rewards", "register_reward"]

Device: TypeAlias = str | torch.device | None
Dtype: TypeAlias = str | torch.dtype
Loader: TypeAlias = Callable[[str, Device, Dtype], AnyReward]

_OFFLINE = "take a reward that works offline, `--reward cosine:bundled` (needs `pip install mmalign[offline]`)"
_OPENAI_B32, _OPENAI_B16, _OPENAI_L14 = (f"open_clip:ViT-{size}/openai" for size in ("B-32", "B-16", "L-14"))


@dataclass(frozen=True)
class RewardSource:
    """A way to name rewards.

    Attributes:
        load: takes what follows `PREFIX:` in a spec ("" where nothing does; an @ that follows stays), device and dtype.
        usage: how a spec is written.
        summary: one line for `mmalign score --list`.
    """

    load: Loader
    usage: str
    summary: str = ""


def load_reward(spec: str, *, device: Device = None, dtype: Dtype = "auto") -> Reward:
    """Load a reward by name, ready to use on `device`.

    Args:
        spec: `cosine:ENCODER`; `clipscore` or `clipscore:ENCODER`, `clipscore-percent` likewise; `pickscore` or
            `pickscore:FOLDER`; `hps-v2.1` or `hps-v2`, or `hps-v2.1:FILE`; `aesthetic-v2` or `aesthetic-v2:HEAD_FILE`,
            `aesthetic-v1:HEAD_FILE`, both also with `@ENCODER` at the end; `f-clipscore:ENCODER`;
            `jpeg-compressibility`, `jpeg-incompressibility`; the address of a server, `http://HOST:PORT/PATH` or
            https, see `RemoteReward`; a prefix of `register_reward`; or `MODULE:FUNCTION`, a callable of your own (or
            a `Reward`), looked for in the working folder, too. ENCODER is what `mmalign.load_encoder` takes.
        device: see `mmalign.Encoder.to`; the fastest present by default.
        dtype: of image towers, likewise: the fastest by default; float32 gives the same scores on every machine.

    Raises:
        InputError: the spec names nothing known, or something that cannot be used.
        EncoderUnavailableError: weights of an encoder are not on this machine and cannot be fetched.
        ModelUnavailableError: likewise, weights of a reward or its server.
    """
    prefix = re.split("[:@]", spec, maxsplit=1)[0]
    rest = spec[len(prefix) :].removeprefix(":")
    source = REWARDS.get(prefix)
    if source is not None:
        if spec.endswith((":", "@")):
            raise InputError(f"reward {spec!r} ends in {spec[-1]!r}; say {source.usage}")
        return as_reward(source.load(rest, device, dtype))
    if spec.startswith(f"{prefix}:") and rest:
        return as_reward(_own(spec, prefix, rest))
    raise InputError(f"reward {spec!r} is not known{_like(prefix)}; give one of {_usages()}")


def load_rewards(specs: str | Sequence[str], *, device: Device = None, dtype: Dtype = "auto") -> Reward:
    """One reward, or the weighted sum of several: `["hps-v2.1=1", "clipscore:bundled=0.5"]`.

    A weight is what follows the last `=`, 1 where none does. Terms are named by their rewards, by their specs where two
    rewards have one name.

    Raises:
        InputError: as `load_reward`; or no spec, the same twice, or a weight that is no finite number.
        EncoderUnavailableError: as `load_reward`.
        ModelUnavailableError: as `load_reward`.
    """
    parts = [_weighted(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    if not parts:
        raise InputError(f"there is no reward; give one of {_usages()}")
    names = [spec for spec, _ in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"reward {twice!r} is given twice; add the weights up")
    rewards = [load_reward(spec, device=device, dtype=dtype) for spec in names]
    if len(rewards) == 1 and parts[0][1] == 1:
        return rewards[0]
    own = [reward.name for reward in rewards]
    terms = {
        name if own.count(name) == 1 else spec: (weight, reward)
        for name, (spec, weight), reward in zip(own, parts, rewards, strict=True)
    }
    return WeightedSum(
        terms, name=" + ".join(name if weight == 1 else f"{weight:g} {name}" for name, (weight, _) in terms.items())
    )


def register_reward(prefix: str, load: Loader, *, summary: str = "") -> None:
    """Make `load_reward("prefix:REST")` and `load_reward("prefix")` call `load(REST or "", device, dtype)`.

    Raises:
        InputError: the prefix is taken by the library, or no name.
    """
    if prefix in _BUILT_IN or not re.fullmatch(r"[A-Za-z][\w.-]*", prefix):
        raise InputError(f"prefix {prefix!r} is taken or no name; give another")
    REWARDS[prefix] = RewardSource(load, f"{prefix}[:...]", summary)


# -- what the library loads ----------------------------------------------------------------------------------------


def _encoder(spec: str, device: Device, dtype: Dtype) -> Encoder:
    from mmalign.encoders import load_encoder
    from mmalign.encoders.hub import unavailable

    try:
        return load_encoder(spec, device=device, dtype=dtype)
    except EncoderUnavailableError as error:
        if error.__context__ is None:  # a package is missing, and the message says which
            raise
        raise unavailable(spec, error.__context__, remedy=_OFFLINE) from None


def _named(prefix: str, rest: str, example: str) -> str:
    if not rest:
        raise InputError(f"reward {prefix!r} names no encoder; say {prefix}:ENCODER, for example {prefix}:{example}")
    return rest


def _nothing(name: str, rest: str) -> None:
    if rest:
        raise InputError(f"reward {name!r} takes nothing after its name, not {rest!r}; leave it out")


def _cosine(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .cosine import CosineReward

    return CosineReward(_encoder(_named("cosine", rest, "bundled"), device, dtype))


def _clip_score(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .clip_score import CLIPScore

    return CLIPScore(_encoder(rest or _OPENAI_B32, device, dtype))


def _clip_score_percent(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .clip_score import CLIPScore

    return CLIPScore(_encoder(rest or _OPENAI_L14, device, dtype), convention="percent")


def _pick_score(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .pick_score import WEIGHTS, load_pick_score

    return load_pick_score(rest or WEIGHTS, device=device, dtype=dtype)


def _hps_v2_1(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .hps import load_hps

    return load_hps(rest or None, version="v2.1", device=device, dtype=dtype)


def _hps_v2(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .hps import load_hps

    return load_hps(rest or None, version="v2", device=device, dtype=dtype)


def _aesthetic_v2(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .aesthetic import Aesthetic, read_aesthetic_head

    file, encoder = _file_and_encoder(rest)
    head = read_aesthetic_head(file) if file else None
    return Aesthetic(_encoder(encoder or _OPENAI_L14, device, dtype), head)


def _aesthetic_v1(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .aesthetic import Aesthetic, read_aesthetic_head

    file, encoder = _file_and_encoder(rest)
    if not file:
        raise InputError(
            "reward 'aesthetic-v1' names no head; download sa_0_4_vit_l_14_linear.pth (4 kB) from "
            "github.com/LAION-AI/aesthetic-predictor and say aesthetic-v1:FILE; aesthetic-v2 brings its own"
        )
    head = read_aesthetic_head(file)
    narrow = _OPENAI_B16 if "b_16" in Path(file).name else _OPENAI_B32
    own = narrow if head.layers[0][0].shape[1] == 512 else _OPENAI_L14
    return Aesthetic(_encoder(encoder or own, device, dtype), head, name="aesthetic-v1")


def _file_and_encoder(rest: str) -> tuple[str, str]:
    """`FILE@ENCODER`, either of which may be absent; an @ in the name of a file that is there belongs to the name."""
    if Path(rest).is_file():
        return rest, ""
    file, _, encoder = rest.partition("@")
    return file, encoder


def _f_clip_score(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .f_clip_score import FCLIPScore

    return FCLIPScore(_encoder(_named("f-clipscore", rest, _OPENAI_B32), device, dtype))


def _jpeg_compressibility(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .jpeg_size import JPEGSize

    _nothing("jpeg-compressibility", rest)
    return JPEGSize()


def _jpeg_incompressibility(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .jpeg_size import JPEGSize

    _nothing("jpeg-incompressibility", rest)
    return JPEGSize(incompressible=True)


def _redness(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .redness import Redness

    _nothing("redness", rest)
    return Redness()


def _http(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .remote import RemoteReward

    return RemoteReward(f"http:{rest}")


def _https(rest: str, device: Device, dtype: Dtype) -> Reward:
    from .remote import RemoteReward

    return RemoteReward(f"https:{rest}")


REWARDS: dict[str, RewardSource] = {
    usage.partition(":")[0].partition("[")[0]: RewardSource(load, usage, summary)
    for load, usage, summary in (
        (_cosine, "cosine:ENCODER", "cosine of image and prompt; cosine:bundled works offline"),
        (_clip_score, "clipscore[:ENCODER]", f"2.5 max(cos, 0), with {_OPENAI_B32}"),
        (_clip_score_percent, "clipscore-percent[:ENCODER]", f"100 cos as in torchmetrics, with {_OPENAI_L14}"),
        (_pick_score, "pickscore[:FOLDER]", "PickScore, about 18 to 24 (ViT-H/14, 4 GB)"),
        (_hps_v2_1, "hps-v2.1[:FILE]", "Human Preference Score v2.1, about 0.2 to 0.4 (ViT-H/14, 2 GB)"),
        (_hps_v2, "hps-v2[:FILE]", "Human Preference Score v2, not comparable with v2.1"),
        (_aesthetic_v2, "aesthetic-v2[:HEAD_FILE][@ENCODER]", f"LAION's, about 1 to 10, by {_OPENAI_L14}; no prompt"),
        (_aesthetic_v1, "aesthetic-v1:HEAD_FILE[@ENCODER]", "the older LAION head; no prompt"),
        (_f_clip_score, "f-clipscore:ENCODER", "how much words of the prompt contradict the image; 0 where none does"),
        (_jpeg_compressibility, "jpeg-compressibility", "minus the JPEG's size in kB; no prompt, no gradient"),
        (_jpeg_incompressibility, "jpeg-incompressibility", "the JPEG's size in kB; no prompt, no gradient"),
        (_http, "http://HOST:PORT/PATH", "a server of your own, see generation.rewards.RemoteReward; no gradient"),
        (_https, "https://HOST/PATH", "likewise"),
        (_redness, "redness", "red less green and blue, to try training out; no prompt"),
    )
}  # fmt: skip
_BUILT_IN = frozenset(REWARDS)


# -- specs ---------------------------------------------------------------------------------------------------------


def _weighted(spec: str) -> tuple[str, float]:
    name, equals, weight = spec.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        return spec, 1.0
    if not equals or re.fullmatch(r"https?://.*[?&][^=&]*", name):  # the number belongs to the address
        return spec, 1.0
    if not math.isfinite(number):
        raise InputError(f"reward {spec!r} has the weight {weight}; give a finite number")
    return name, number


def _own(spec: str, module: str, name: str) -> AnyReward:
    """What a module of the user's calls `name`."""
    known = f"; no reward is called {module!r}{_like(module)}, see `mmalign score --list`"
    module = module.removesuffix(".py")
    if not all(part.isidentifier() for part in module.split(".")):
        raise InputError(f"reward {spec!r} is not known{_like(module)}; give one of {_usages()}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise InputError(f"reward {spec!r} cannot be imported ({reason_of(error)}){known}") from None
    except AttributeError as error:
        raise InputError(f"reward {spec!r} is not there ({reason_of(error)}); give a function of that module") from None
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"reward {spec!r} failed at {place.filename}:{place.lineno} ({type(error).__name__}: {reason_of(error)}); "
            "mend it there"
        ) from None
    finally:
        sys.path.remove(here)
    return found  # type: ignore[return-value]


def _like(name: str) -> str:
    from mmalign.encoders.hub import closest

    return closest(name, [*REWARDS])


def _usages() -> str:
    return ", ".join(source.usage for source in REWARDS.values()) + ", or MODULE:FUNCTION of your own"
