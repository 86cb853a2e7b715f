"""The licence of a checkpoint in the Hub's spelling.

The Hub knows a closed list of identifiers; anything else is `other` with a name and, where there is one, a link. The
list is the Hub's documentation of repository licences.
"""

from __future__ import annotations

import re

from llmcompress.report import Source

KNOWN = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl lgpl-2.1
    lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
    ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)


def licence_fields(source: Source) -> dict[str, str]:
    """`license`, and for one that the Hub does not know `license_name` and `license_link`; empty where none is stated.

    A link that is a file of the source's repository is made whole; one that leads nowhere from here is left out.
    """
    if source.licence is None:
        return {}
    given = source.licence.strip().lower()
    if given in KNOWN:
        return {"license": given}
    named = source.licence_name or (source.licence if given != "other" else "see-base-model")
    link = _whole_link(source)
    return {"license": "other", "license_name": _slug(named)} | ({"license_link": link} if link else {})


def _whole_link(source: Source) -> str | None:
    link = source.licence_link
    if link is None or link.startswith(("https://", "http://")):
        return link
    if source.hub_id is None:
        return None
    return f"https://huggingface.co/{source.hub_id}/blob/{source.revision or 'main'}/{link.removeprefix('./')}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "unnamed"
