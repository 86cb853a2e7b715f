"""Keys and tokens in files: what must not leave the machine, found by how it looks, in bounded memory.

Each form is one that only keys have (a prefix that its maker gave it, a PEM header, a signed token), so that no
vocabulary is an alarm. The prefix is looked for first, which is fast, and the rest where it stands. Of
safetensors only the header is looked at: the rest is numbers.
"""

from __future__ import annotations

import re

from llmcompress.publish.contents import File

OVERLAP_BYTES = 8192
"""Of each chunk the end is looked at again with the next: longer than any match."""

FORMS: tuple[tuple[str, bytes, bytes], ...] = (
    ("private key", b"-----BEGIN ", rb"[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"),
    ("private key", b"PuTTY-User-Key-File-", rb"\d"),
    ("Hugging Face access token", b"hf_", rb"[A-Za-z0-9]{20}"),
    ("Hugging Face access token", b"api_org_", rb"[A-Za-z0-9]{20}"),
    ("API key", b"sk-", rb"(?:\w{16}|(?=[\w-]{0,200}\d)[\w-]{20})"),
    ("cloud key", b"AKIA", rb"[A-Z0-9]{16}\b"),
    ("cloud key", b"ASIA", rb"[A-Z0-9]{16}\b"),
    ("cloud key", b"AIza", rb"[\w-]{35}"),
    ("cloud key", b"ya29.", rb"[\w-]{20}"),
    ("cloud key", b"AccountKey=", rb"[A-Za-z0-9+/]{80,90}=="),
    ("repository token", b"ghp_", rb"[A-Za-z0-9]{30}"),
    ("repository token", b"gho_", rb"[A-Za-z0-9]{30}"),
    ("repository token", b"ghs_", rb"[A-Za-z0-9]{30}"),
    ("repository token", b"ghu_", rb"[A-Za-z0-9]{30}"),
    ("repository token", b"ghr_", rb"[A-Za-z0-9]{30}"),
    ("repository token", b"github_pat_", rb"\w{40}"),
    ("repository token", b"glpat-", rb"[\w-]{20}"),
    ("registry token", b"npm_", rb"[A-Za-z0-9]{36}\b"),
    ("registry token", b"pypi-AgE", rb"[\w-]{50}"),
    ("service token", b"xox", rb"[abeprs]-[A-Za-z0-9-]{10}"),
    ("service token", b"sk_live_", rb"[A-Za-z0-9]{16}"),
    ("service token", b"rk_live_", rb"[A-Za-z0-9]{16}"),
    ("signed token", b"eyJ", rb"[\w-]{10,1000}\.eyJ[\w-]{10,4000}\.[\w-]{10}"),
    ("password in an address", b"http", rb"s?://[^\s/:@'\"<>]{1,100}:[^\s/@'\"<>$]{6,200}@"),
)
ANY_CASE: tuple[tuple[str, bytes, bytes], ...] = (
    ("cloud key", b"aws", rb"_?secret_?access_?key['\"]?\s{0,4}[=:]\s{0,4}['\"]?[a-z0-9/+]{40}"),
    ("bearer token", b"authorization", rb"['\"]?\s{0,4}[:=]\s{0,4}['\"]?bearer\s{1,4}[a-z0-9._~+/-]{24}"),
)
"""What stands in capitals or not: looked for in small letters."""


def _compiled(forms: tuple[tuple[str, bytes, bytes], ...]) -> list[tuple[str, bytes, re.Pattern[bytes]]]:
    return [(kind, prefix, re.compile(rb"(?<!\w)" + re.escape(prefix) + rest)) for kind, prefix, rest in forms]


_AS_WRITTEN, _IN_SMALL_LETTERS = _compiled(FORMS), _compiled(ANY_CASE)


def secret_in(file: File) -> str | None:
    """What kind of secret a file holds, or None.

    >>> secret_in(File("a.txt", b"-----BEGIN OPENSSH PRIVATE KEY-----")), secret_in(File("a.txt", b"risk-adjusted"))
    ('private key', None)
    """
    end, left = b"", None
    for chunk in file.chunks():
        if left is None:
            left = int.from_bytes(chunk[:8], "little") + 8 if file.name.endswith(".safetensors") else file.num_bytes
        text = end + chunk[:left]
        # Text of two bytes a letter is read as well.
        kind = _kind(text) or (_kind(text.replace(b"\0", b"")) if b"\0" in text else None)
        if kind is not None:
            return kind
        end, left = text[-OVERLAP_BYTES:], left - len(chunk)
        if left <= 0:
            break
    return None


def _kind(text: bytes) -> str | None:
    """The kind of the first form that stands in a text."""
    for forms, content in ((_AS_WRITTEN, text), (_IN_SMALL_LETTERS, text.lower())):
        for kind, prefix, pattern in forms:
            place = content.find(prefix)
            while place >= 0:
                if pattern.match(content, place):
                    return kind
                place = content.find(prefix, place + 1)
    return None
