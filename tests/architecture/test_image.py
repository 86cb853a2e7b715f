"""The Dockerfile's promises that can be read off it: pinned, not root, a health check, signals that arrive."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.architecture.sources import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def pins(file: str) -> dict[str, str]:
    """Package -> version of a list of pip's, hashes left out."""
    text = (ROOT / "scripts" / file).read_text(encoding="utf-8")
    return {name_of(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.M)}


def test_every_package_of_the_image_is_pinned_to_what_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {name_of(one) for one in [*project["dependencies"], *project["optional-dependencies"]["serve"]]}
    image, tested = pins("constraints_image.txt"), pins("constraints.txt")
    assert not needed - image.keys()
    assert {name: image[name] for name in image.keys() & tested.keys()} == {
        name: tested[name] for name in image.keys() & tested.keys()
    }


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_is_not_root_and_has_what_a_service_needs(target: str) -> None:
    stage = re.split(r"^FROM .* AS ", DOCKERFILE, flags=re.M)
    lines = next(one for one in stage if one.startswith(f"{target}\n")).splitlines()
    assert "USER 10001" in lines and "STOPSIGNAL SIGTERM" in lines and 'ENTRYPOINT ["llmcompress"]' in lines
    assert any(line.startswith("HEALTHCHECK ") for line in lines) and "VOLUME /model" in lines
    assert not any(line.startswith("USER ") for line in lines[lines.index("USER 10001") + 1 :])


def test_base_images_have_a_version() -> None:
    images = re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, flags=re.M)
    assert len(images) == 2 and all(re.search(r":v?\d+\.\d+\.\d+", one) for one in images)


@pytest.mark.parametrize("file", [f"constraints_{part}.txt" for part in ("image", "build", "sources", "cuda")])
def test_every_package_has_a_digest_but_torch(file: str) -> None:
    text = (ROOT / "scripts" / file).read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==\S+((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", text, flags=re.M)
    assert [name for name, hashes in entries if not hashes] == (["torch"] if file == "constraints_image.txt" else [])
    assert len(entries) == len(pins(file)) == sum(not line.startswith((" ", "#")) for line in text.splitlines())


def test_nothing_is_installed_that_is_not_pinned() -> None:
    """Each pip install is of a list with digests, of torch's line, or of the wheel that was just built."""
    commands = re.findall(r"pip install (?:[^&\n\\]|\\\n)*", DOCKERFILE.split("ARG PYTHON_IMAGE", 1)[1])
    assert len(commands) == 6
    for command in commands:
        assert "--no-deps" in command
        assert "--require-hashes" in command or "torch.txt" in command or "/dist/" in command
    wheels = re.findall(r"pip wheel .*", DOCKERFILE)
    assert len(wheels) == 2 and all("--no-build-isolation" in command and "--no-deps" in command for command in wheels)


def test_the_lists_are_in_the_build_context() -> None:
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in re.findall(r"scripts/constraints_(?!\*)\w+\.txt", DOCKERFILE)} <= set(sent)


def test_what_the_cuda_image_adds_is_what_the_cpu_image_has() -> None:
    image = pins("constraints_image.txt")
    assert {name: image.get(name) for name in pins("constraints_cuda.txt")} == pins("constraints_cuda.txt")
