"""What the source's own model card declares: licence, languages, task. Read, never invented."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def source_metadata(folder: Path) -> dict[str, Any]:
    """licence, licence_name, licence_link, languages and pipeline_tag from README.md's front matter, where stated."""
    import yaml

    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    if not text.startswith("---"):
        return {}
    try:
        front = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return {}
    if not isinstance(front, dict):
        return {}
    languages = front.get("language") or []
    found = {
        "licence": front.get("license"),
        "licence_name": front.get("license_name"),
        "licence_link": front.get("license_link"),
        "languages": [str(each) for each in (languages if isinstance(languages, list) else [languages])],
        "pipeline_tag": front.get("pipeline_tag"),
    }
    return {key: value for key, value in found.items() if isinstance(value, (str, list)) and value}


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in `folder` says how a chat is laid out."""
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and b'"chat_template"' in config.read_bytes()
