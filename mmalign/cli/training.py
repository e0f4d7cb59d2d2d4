"""`mmalign train METHOD`: one command per method, its options made from the method's config."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from mmalign.errors import InputError

from .options import PARTIAL, say

if TYPE_CHECKING:
    from generation.training.trainer import Trainer

__all__ = ["MethodCommand", "train_app"]


class _MethodGroup(TyperGroup):
    """Makes a method's command when it is asked for: its config needs pydantic, its trainer torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        from generation.methods import METHODS

        return [*METHODS, *(name for name in self.commands if name not in METHODS)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        if cmd_name not in self.commands:
            self.commands[cmd_name] = _command(cmd_name)
        return self.commands[cmd_name]


class MethodCommand(TyperCommand):
    """Leaves the --no- forms out of the help's columns, which else are too narrow for the names at 80 characters."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As the base class, without them."""
        opposites = [parameter.secondary_opts for parameter in self.params]
        for parameter in self.params:
            parameter.secondary_opts = []
        try:
            super().format_help(ctx, formatter)
        finally:
            for parameter, names in zip(self.params, opposites, strict=True):
                parameter.secondary_opts = names


train_app = typer.Typer(cls=_MethodGroup, no_args_is_help=True, rich_markup_mode=None)


@train_app.callback()
def _train() -> None:
    """Fine-tune image generators with preference data or rewards, or (oca) an image encoder.

    Each method has its own --help.

    The same command goes on where an interrupted run stopped, bit for bit.
    """


def _command(method: str) -> Any:
    from generation.methods import METHODS

    kind = METHODS[method].config_class
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    app.command(
        cls=MethodCommand,
        help=f"{kind.summary}\n\nDATA: {kind.data_kinds}\n{_EXPLANATION.format(more=kind.explanation)}",
        epilog=_EPILOG.format(method=method, example=kind.example),
    )(_function(METHODS[method]))
    command = typer.main.get_command(app)
    command.name = method
    return command


_EXPLANATION = """
Settings rise in rank: defaults, --preset, --config FILE.yaml, options.
All are written to OUTPUT/config.yaml. What is on or off has both --NAME and
--no-NAME, e.g. --no-cache.

{more}
Ctrl-C saves a checkpoint; the same command resumes.
"""
_EPILOG = "Try it in a minute, without a GPU and without weights:  mmalign train {method} {example} --dry-run"


def _function(trainer: type[Trainer]) -> Callable[..., None]:
    """A function whose signature typer turns into options: one per field, all unset unless given."""
    config_class = trainer.config_class
    hints = get_type_hints(config_class)

    def run(config: Path | None = None, quiet: bool = False, **options: Any) -> None:
        _train_with(trainer, config, quiet, options)

    parameters = [
        _parameter("data", str | None, typer.Argument(help="Training data.", show_default=False), None),
        _parameter("output", Path | None, typer.Argument(help="Run folder.", show_default=False), None),
        _parameter("config", Path | None, typer.Option("--config", "-c", help="YAML file of settings."), None),
        _parameter("quiet", bool, typer.Option("--quiet", "-q", help="No progress bar."), False),
    ]
    for field in dataclasses.fields(config_class):
        if field.name not in ("data", "output", "progress"):
            about: Any = field.default
            panel = about.json_schema_extra["panel"] or f"Options of {config_class.method}"
            parameters.append(_option(field, hints[field.name], panel))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(field: Any, hint: Any, panel: str) -> inspect.Parameter:
    about = field.default
    default = about.get_default(call_default_factory=True)
    text = about.description
    if "(default:" not in text and default is not None and default is not False and default != []:
        shown = " ".join(str(part) for part in default) if isinstance(default, list | tuple) else default
        text += f" (default: {shown})"
    inner = _without_none(hint)
    flag = f"--{field.name.replace('_', '-')}"
    if get_origin(inner) is Literal:
        text = f"{' | '.join(get_args(inner))}. {text}"
        inner = str
    elif inner is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    return _parameter(field.name, inner | None, typer.Option(flag, help=text, rich_help_panel=panel), None)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [part for part in get_args(hint) if part is not type(None)]
    return hint


def _parameter(name: str, hint: Any, about: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[hint, about]
    )


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """On standard error, while the run goes."""
    log, handler = logging.getLogger("generation.training"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _train_with(trainer: type[Trainer], file: Path | None, quiet: bool, options: dict[str, Any]) -> None:
    from generation.training.configuration import load_config, read_yaml
    from generation.training.reward_training import RewardConfig

    given = {name: value for name, value in options.items() if value not in (None, [])}
    given["progress"] = not quiet and (read_yaml(file) if file else {}).get("progress", True)
    config = load_config(trainer.config_class, given, file)
    if not config.data or config.output == Path():
        absent = "run folder" if config.data else "training data"
        usage = f"mmalign train {config.method} {config.example}"
        raise InputError(f"no {absent} given; say {usage}, or name data and output in the --config file")
    with _warnings_shown():
        report = trainer(config).train()
    if int(os.environ.get("RANK", "0")):  # one of several processes speaks
        return
    for path in report.exported:
        print(path)
    if config.adaptation == "lora" and len(report.exported) == 1:
        say("no kohya file: DoRA, LoRAs outside attention blocks, SD3 and FLUX have the diffusers format only")
    for name in report.first_look if isinstance(config, RewardConfig) else ():
        if name in report.values and not name.endswith(("_std", "_held_out")):
            words = name.removeprefix("probe_").replace("_", " ")
            say(f"probe: {words} {report.first_look[name]:.4g} -> {report.values[name]:.4g}")
    begun = f", resumed at {report.resumed_from:,}" if report.resumed_from else ""
    if report.resumed_from == report.step:
        begun = ", ended before" if report.ended else ", finished before; raise --steps to go on"
    steps = "1 step" if report.step == 1 else f"{report.step:,} steps"
    say(f"{steps}{begun}; settings, samples and metrics in {report.output}")
    if report.left_out:
        said = "row was" if report.left_out == 1 else "rows were"
        say(f"{report.left_out:,} {said} left out; see {report.output / 'left_out_rows.jsonl'}")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # a launcher takes any code but 0 for a crash
            raise typer.Exit(PARTIAL)
