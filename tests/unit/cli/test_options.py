"""Options are made of settings: each is there, reads well, and comes back as the recipe has it."""

from __future__ import annotations

from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel

from llmcompress.cli.main import app
from llmcompress.cli.options import Verb, settings_options
from llmcompress.cli.options import given as without_none
from llmcompress.config.options import leaves, nested, option
from llmcompress.config.stage import STAGES, stage
from llmcompress.errors import LLMCompressError


class Inner(BaseModel):
    learning_rate: float = option(1e-3, "Peak learning rate.", group="Training", metavar="LR", gt=0)


class Settings(BaseModel):
    path: str = option(..., "Rows.", flag="--data", metavar="DATA")
    rank: int = option(16, "Rank.", metavar="R")
    symmetric: bool | None = option(None, "Zero point. [default: as the preset]", negative="--asymmetric")
    packing: bool = option(False, "Packing.")
    forward: bool = option(True, "Forward pass.")
    effort: Literal["standard", "max"] = option("standard", "Effort.")
    method: str = option("gptq", "Method.", choices=lambda: ["gptq", "rtn"])
    ignore: list[str] = option([], "Linears to leave.", metavar="PATTERN")
    secret: int = option(0, "Not shown.", hidden=True)
    training: Inner = Inner()


def command(seen: dict[str, Any]) -> click.Command:
    return Verb(
        "verb", params=list(settings_options(Settings)), callback=lambda **values: seen.update(values), help="Do."
    )


def parsed(*arguments: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    done = CliRunner().invoke(command(seen), ["--data", "d", *arguments])
    assert done.exit_code == 0, done.output
    return nested(Settings, without_none(seen), "verb")


def test_nothing_given_is_nothing_said() -> None:
    assert parsed() == {"path": "d"}


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--rank", "8"], {"rank": "8"}),
        (["--asymmetric"], {"symmetric": False}),
        (["--symmetric"], {"symmetric": True}),
        (["--packing"], {"packing": True}),
        (["--no-forward"], {"forward": False}),
        (["--ignore", "a,b", "--ignore", "c"], {"ignore": ["a", "b", "c"]}),
        (["--learning-rate", "0.1"], {"training": {"learning_rate": "0.1"}}),
    ],
)
def test_what_is_given_comes_back_as_a_recipe_has_it(arguments: list[str], values: dict[str, Any]) -> None:
    assert parsed(*arguments) == {"path": "d"} | values
    Settings.model_validate(parsed(*arguments))


def test_help_shows_groups_choices_and_defaults() -> None:
    text = CliRunner().invoke(command({}), ["--help"], terminal_width=100).output
    assert "Training:\n  --learning-rate LR  Peak learning rate. [default: 0.001]" in text
    assert "--effort NAME" in text and "Effort. [standard, max; default: standard]" in text
    assert "Method. [gptq, rtn; default: gptq]" in text
    assert "Zero point. [default: as the preset]" in text and "--symmetric, --asymmetric" in text
    assert "Rows. [required]" in text and "--no-forward" in text and "--no-packing" not in text
    assert "secret" not in text.lower()


def test_names_that_are_not_known_are_refused_with_the_nearest() -> None:
    with pytest.raises(LLMCompressError) as caught:
        nested(Settings, {"learning_rat": 1}, "verb")
    assert caught.value.hint == "did you mean 'learning_rate'?"


def test_a_mapping_and_an_option_of_it_go_together() -> None:
    assert nested(Settings, {"training": {"learning_rate": 1}, "rank": 2}, "verb") == {
        "training": {"learning_rate": 1},
        "rank": 2,
    }
    assert nested(Settings, {"training": Inner()}, "verb") == {"training": {"learning_rate": 1e-3}}


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_of_every_stage_has_one_option(name: str) -> None:
    verb = app().get_command(click.Context(app()), name)
    assert verb is not None
    flags = [flag for param in verb.params for flag in (*param.opts, *param.secondary_opts)]
    assert len(flags) == len(set(flags)), "two options of one name"
    for leaf in leaves(stage(name).Settings):
        assert leaf.option.hidden or leaf.flag in flags, leaf.path
        assert leaf.field.description, f"{leaf.path} has no help"
        assert leaf.field.description[0].isupper() or leaf.field.description.split()[0].startswith("rs")
        assert (
            leaf.field.description.rstrip("]").rpartition(" [")[0][-1:] in (".", "")
            or leaf.field.description[-1] == "."
        )


def test_values_are_completed() -> None:
    from click.shell_completion import ShellComplete

    complete = ShellComplete(app(), {}, "llmcompress", "_X")
    values = {item.value for item in complete.get_completions(["quantize", "--scheme"], "W")}
    assert {"W4A16", "W3A16"} <= values
    assert {item.value for item in complete.get_completions(["quantize", "--method"], "")} == {"gptq", "rtn"}
    assert {item.value for item in complete.get_completions(["quantize"], "--eff")} == {"--effort"}
    assert "quantize" in {item.value for item in complete.get_completions([], "q")}
    assert [item.value for item in complete.get_completions(["quantize", "--format"], "gptq,bits")] == [
        "gptq,bitsandbytes"
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str) -> None:
    done = CliRunner().invoke(app(), ["completion", shell])
    assert done.exit_code == 0 and "_LLMCOMPRESS_COMPLETE" in done.output and "llmcompress" in done.output


def test_a_new_field_is_an_option_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class More(stage("verify").Settings):  # type: ignore[misc, name-defined]
        colour: str = option("red", "Colour of the check.")

    monkeypatch.setattr(type(stage("verify")), "Settings", More)
    assert "--colour" in CliRunner().invoke(app(), ["verify", "--help"]).output
