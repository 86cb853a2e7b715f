"""Recipes: one frozen value per run, every problem of a file in one pass, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmcompress.config.recipe import Recipe, as_yaml, load, recipe_file, shipped_names
from llmcompress.errors import LLMCompressError

WHOLE: dict[str, Any] = {
    "model": "bundled/tiny",
    "output": "out",
    "stages": [{"quantize": {"scheme": "NF4", "method": "rtn"}}, {"verify": {}}, {"evaluate": {"suite": "tiny"}}],
}


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def lines(source: str, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(LLMCompressError) as caught:
        load(source, overrides or [])
    return caught.value.lines()


def test_dump_holds_every_value_and_gives_the_same_recipe_back() -> None:
    recipe = Recipe.of(WHOLE)
    again = Recipe.of(recipe.dump())
    assert again == recipe and again.digest() == recipe.digest()
    quantize = recipe.dump()["stages"][0]["quantize"]
    assert quantize["on_failure"] == "raise" and quantize["scheme"] == "NF4" and quantize["batch_tokens"] == 1024


def test_yaml_of_a_dump_is_a_recipe_file(tmp_path: Path) -> None:
    recipe = Recipe.of(WHOLE)
    assert load(written(tmp_path, as_yaml(recipe.dump()))) == recipe


def test_digest_follows_every_value_but_the_output() -> None:
    digest = Recipe.of(WHOLE).digest()
    assert Recipe.of(WHOLE | {"output": "elsewhere"}).digest() == digest
    for changed in ({"seed": 1}, {"model": "org/name"}, {"stages": WHOLE["stages"][:1]}):
        assert Recipe.of(WHOLE | changed).digest() != digest


def test_recipes_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.of(WHOLE).seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=5", ("seed",), 5),
        ("quantize.scheme=W4A16", ("stages", 0, "quantize", "scheme"), "W4A16"),
        ("quantize.method_settings.dampening_frac=0.1", ("stages", 0, "quantize", "method_settings"), {"dampening_frac": 0.1}),
        ("evaluate.limit=10", ("stages", 2, "evaluate", "limit"), 10),
        ("quantize.format=[gptq, compressed_tensors]", ("stages", 0, "quantize", "format"), ["gptq", "compressed_tensors"]),
    ],
)  # fmt: skip
def test_an_override_replaces_one_value(override: str, path: tuple[str | int, ...], value: object) -> None:
    before, after = Recipe.of(WHOLE).dump(), Recipe.of(WHOLE, [override]).dump()
    found: Any = after
    for key in path:
        found = found[key]
    assert found == value
    changed = yaml.safe_dump(before).splitlines(), yaml.safe_dump(after).splitlines()
    assert set(changed[0]) != set(changed[1])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("quantize.shceme=NF4", "unknown setting 'shceme'"),
        ("sed=3", "unknown key 'sed'"),
        ("card.x=1", "matches nothing: the recipe has no stage card"),
        ("quantize.ignore.3=x", "is no index"),
        ("seed", "must be key=value"),
        ("seed=[", "not YAML"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(override: str, said: str) -> None:
    with pytest.raises(LLMCompressError, match=said.replace("[", r"\[")):
        Recipe.of(WHOLE | {"stages": [{"quantize": {"ignore": ["*.k_proj"]}}]}, [override])


def test_every_problem_of_a_file_comes_with_its_line(tmp_path: Path) -> None:
    source = written(
        tmp_path,
        "model: m\noutput: o\nsede: 3\nstages:\n  - quantize:\n      scheme: W4A61\n      on_failure: shrug\n  - verfy: {}\n",
    )
    said = lines(source)
    assert any(line.startswith(f"{source}:3: unknown key 'sede'") for line in said)
    assert any(line.startswith(f"{source}:7: quantize.on_failure: ") for line in said)
    assert any(line.startswith(f"{source}:8: unknown stage 'verfy'") for line in said)
    assert "hint: did you mean 'verify'?" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\noutput: o\nstages: []\n", "stages: must be a list"),
        ("model: m\nstages: [{verify: {}}]\n", "output: must be given"),
        ("model: m\nmodel: n\noutput: o\nstages: [{verify: {}}]\n", "model: given twice"),
        ("model: [\n", "not YAML"),
        ("- a\n", "must be a list of `key: value` lines"),
        ("model: m\noutput: o\nstages: [{card: {}}, {verify: {}}]\n", "stage verify after card"),
        ("model: m\noutput: o\nstages: [{verify: {}}, {verify: {}}]\n", "stage verify after verify"),
        ("model: m\noutput: o\nstages: [{quantize: {scheme: NF4, group_size: 32}}]\n", "NF4 has 4 bits, blocks of 64"),
        ("model: m\noutput: o\nstages: [{quantize: {scheme: W4A61}}]\n", "unknown scheme 'W4A61'"),
    ],
)
def test_a_broken_file_is_said_to_be_broken(text: str, said: str, tmp_path: Path) -> None:
    assert any(said in line for line in lines(written(tmp_path, text)))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    assert lines("quickstrat")[1] == "hint: did you mean 'quickstart'?"
    assert "no such recipe file" in lines("no/such.yaml")[0]


def test_shipped_recipes_start_with_a_line_that_describes_them() -> None:
    assert "quickstart" in shipped_names()
    assert all(recipe_file(name).read_text().startswith("# ") for name in shipped_names())
