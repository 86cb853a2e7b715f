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
    lines = (ROOT / "scripts" / file).read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name_of(name): version for name, version in pinned}


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
