"""The checkpoint that went in."""

from __future__ import annotations

from pydantic import Field

from llmcompress.report.part import Part


class Source(Part):
    """The checkpoint that went in. Written by quantize."""

    name: str = Field(description="as the user gave it: a folder or a Hub id")
    hub_id: str | None = Field(description="only when it came from the Hub; a card never shows a local path")
    revision: str | None = Field(description="commit of the Hub revision")
    identity: str = Field(description="sha256 over config.json and the tensor bytes of the checkpoint")
    architecture: str
    dtype: str = Field(description="of most of the weights, e.g. bfloat16")
    num_parameters: int = Field(description="tied weights once")
    weights_bytes: int
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = []
    pipeline_tag: str | None = None
    chat_template: bool = Field(default=False, description="its tokenizer lays chats out")
