"""The command `llmcompress`: what it offers, and how it ends.

    llmcompress VERB …  ──click──> options of the verb's settings ──> the verb of Python ──> a recipe, run ──> printed

Exit codes: 0 fine, 1 a check or a budget failed, 2 bad input, 130 interrupted. Data goes to stdout, the rest to stderr.
Whatever goes wrong is one line `error: …` and, where something can be done about it, one line `hint: …`;
LLMCOMPRESS_DEBUG=1 shows the traceback too.

Why click, with options made by our own `cli/options.py`: of processor time, `quantize --help` with all settings
imported takes 0.28 s (the import alone 0.27), with pydantic-settings 0.31, tyro 0.35, cyclopts 0.45. None of the three
shows options under headings of the settings' own together with choices, defaults and an example, keeps `--json`-clean
one-line errors, and completes choices in bash and zsh; click is also what huggingface_hub installs already.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Any

import click

from llmcompress import __version__
from llmcompress.cli.options import WIDTH, Option
from llmcompress.distributed import leave, speaks
from llmcompress.errors import LLMCompressError
from llmcompress.memory import managed

BAD_INPUT, INTERRUPTED = 2, 130
COMPLETE = "_LLMCOMPRESS_COMPLETE"
"""The variable by which a shell asks for completions."""
DEBUG = "LLMCOMPRESS_DEBUG"
SECTIONS = {
    "Ship": ("compare", "reproduce", "push", "serve"),
    "Look up": ("plan", "run", "recipes", "methods", "guide", "completion"),
}
HINTS = {
    errno.ENOSPC: "free some; the same command goes on from what was finished",
    errno.EDQUOT: "free some; the same command goes on from what was finished",
    errno.EACCES: "choose a place that you may read and write, or change its permissions",
    errno.EPERM: "choose a place that you may read and write, or change its permissions",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose an output on another file system",
    errno.EROFS: "choose an output on a disk that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files of this machine",
}
"""What can be done about what the system refuses."""


class App(click.Group):
    """All verbs, each made when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Stages in their order, then what is no stage."""
        return [name for names in self.sections().values() for name in names]

    def sections(self) -> dict[str, tuple[str, ...]]:
        """Heading -> verbs."""
        from llmcompress.config.stage import stages

        makes = {"Make": tuple(kind.name for kind in stages("transform"))}
        return makes | {"Check": tuple(kind.name for kind in stages("check"))} | SECTIONS

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of a verb, or None."""
        from llmcompress.config.stage import STAGES

        if name in STAGES:
            from llmcompress.cli.stages import verb

            return verb(name)
        from llmcompress.cli.tools import VERBS

        return VERBS[name]() if name in VERBS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command, or an error with the nearest one."""
        from llmcompress.errors import unknown

        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise unknown("command", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs under their headings, a line each."""
        for title, names in self.sections().items():
            with formatter.section(title):
                commands = [(name, self.get_command(ctx, name)) for name in names]
                formatter.write_dl([(name, command.get_short_help_str(WIDTH)) for name, command in commands if command])


def app() -> App:
    """The command, without its process."""
    return App(
        "llmcompress",
        help="Make a language-model checkpoint small, measure what that cost, and ship it with the evidence.",
        params=[Option(["version", "--version"], is_flag=True, expose_value=False, is_eager=True,
                       callback=_version, help="Show the version.")],
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
    )  # fmt: skip


def _version(ctx: click.Context, param: click.Parameter, shown: bool) -> None:
    if shown and not ctx.resilient_parsing:
        print(__version__)
        ctx.exit()


def main() -> None:
    """The entry point. OpenMP's idle threads sleep instead of spinning, which on a busy machine costs whole cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars, beside which ours could not be read
    with managed():
        sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command, and give its exit code; whatever it meets is said in a line."""
    try:
        code = app().main(arguments, prog_name="llmcompress", complete_var=COMPLETE, standalone_mode=False)
        leave()
        return int(code or 0)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; the same command goes on from the last layer or stage that was finished", file=sys.stderr)
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return BAD_INPUT
    except Exception as error:  # noqa: BLE001  # the one place where a traceback ends
        if os.environ.get(DEBUG):
            traceback.print_exc()
        if speaks() or not isinstance(error, LLMCompressError) or error.of_this_process:
            for line in explained(error):
                print(line if line.startswith("hint: ") else f"error: {line}", file=sys.stderr)
        return BAD_INPUT


def explained(error: Exception) -> list[str]:
    """What to print of an error: one line for each problem, with a hint below it where there is one."""
    if isinstance(error, LLMCompressError):
        return error.lines()
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "llmcompress"
        return [_one_line(error.format_message()), f"hint: {command} --help"]
    system = _of_the_system(error)
    if system is not None:
        error = system
        what = "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()
        writing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        where = error.filename or ("the output" if writing else "the system")
        return [f"{where}: {what}", *([f"hint: {HINTS[error.errno]}"] if error.errno in HINTS else [])]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return [
            f"not enough memory ({_one_line(str(error)) or 'the system gave no more'})",
            "hint: `llmcompress plan MODEL` says what is needed; smaller batches and shorter rows need less",
        ]
    if isinstance(error, RecursionError):
        return ["the input is nested too deeply", f"hint: set {DEBUG}=1 to see where"]
    return [
        f"unexpected {type(error).__name__}: {_one_line(str(error)) or 'without a message'}",
        f"hint: set {DEBUG}=1 to see the traceback; if the input is sound, please report it with the command",
    ]


SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EACCES)
"""What a library may have met when it wrote or read a file, and told in an exception of its own."""


def _of_the_system(error: BaseException) -> OSError | None:
    """The refusal of the system that an error is, was raised from, or repeats in its text (as Rust and C++ do)."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, MemoryError | RecursionError):
        return None
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in SYSTEM:
        return error.__cause__
    text = str(error)
    number = next((code for code in SYSTEM if f"os error {code})" in text or os.strerror(code) in text), None)
    return OSError(number, os.strerror(number)) if number is not None else None


def _one_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:400]
