"""The `mmalign` command; what is heavy is imported by the command that needs it.

The only part of `mmalign` that may import `retrieval` and `generation`.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmalign.errors import InputError, MMAlignError, reason_of

from .aligning import align, eval_captions, eval_zero_shot
from .best import best
from .data import data_app
from .diversity import eval_diversity, eval_diversity_prompts
from .explaining import eval_words, explain
from .fine_tuning import train_oca
from .generating import generate
from .indexing import index_app
from .inspecting import encoders, eval_app, info, verify
from .options import INTERRUPTED, NO_RESULT, PARTIAL, say
from .scoring import score
from .searching import duplicates, search, similar
from .training import MethodCommand, train_app
from .upgrading import upgrade

__all__ = ["INTERRUPTED", "NO_RESULT", "PARTIAL", "main"]

_RESUMED = ("index", "upgrade", "align", "train", "generate")  # they keep what was done before they were stopped


class _Commands(TyperGroup):
    """Says after Ctrl-C what became of the work."""

    def invoke(self, ctx: Any) -> Any:
        """As the base class."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            kept = "; what was saved so far is kept, and the same command goes on from there"
            say(f"stopped{kept if ctx.invoked_subcommand in _RESUMED else ''}")
            raise


app = typer.Typer(
    name="mmalign",
    cls=_Commands,
    help="Search folders of images in any words; align encoders; draw images, and fine-tune generators.",
    epilog=(
        "Start with:  mmalign index photos/   then   mmalign search photos/ 'red bicycle in snow'.  "
        "Exit codes: 0 done, 1 error, 2 wrong usage, 3 nothing found, 4 done but files or rows were left out."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


app.add_typer(
    index_app, name="index", help="Index a folder of images, or bring its index up to date; merge, import, export."
)
for _command in (search, similar, duplicates, info, verify, upgrade, encoders, align, generate, best, score, explain):
    app.command()(_command)
train_app.command("oca", cls=MethodCommand)(train_oca)
app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data", help="Look through training data before anything is trained on them.")
eval_app.command("captions")(eval_captions)
eval_app.command("zero-shot")(eval_zero_shot)
eval_app.command("diversity")(eval_diversity)
eval_app.command("diversity-prompts")(eval_diversity_prompts)
eval_app.command("words")(eval_words)
app.add_typer(eval_app, name="eval", help="Measure an index, encoders, or how diverse drawn images are.")


def _version(wanted: bool) -> None:
    if wanted:
        from mmalign import __version__

        print(f"mmalign {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            help="Import this module of yours first, which defines encoders or registers sources and index types: "
            "mmalign --plugin MODULE index ..."
        ),
    ] = None,
) -> None:
    for name in plugin or []:
        sys.path.insert(0, str(Path.cwd()))
        try:
            import_module(name.removesuffix(".py"))
        except ImportError as error:
            raise InputError(f"plugin {name!r} cannot be imported ({reason_of(error)}); give a module's name") from None
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"plugin {name!r} failed at {place.filename}:{place.lineno} ({type(error).__name__}: "
                f"{reason_of(error)}); mend it there"
            ) from None


def main() -> None:
    """Run the command line; errors of ours become one line and exit code 1."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app()
    except MMAlignError as error:
        say(f"error: {error}")
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
