"""Where a model is edited: which matrices of a layer, by the name that hyper-parameters and patches give to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPERTS = "experts"
"""The down-projections of the routed experts."""
SHARED_EXPERT = "shared_expert"
"""That of the expert which every token visits beside the routed ones."""
DENSE = "dense"
"""That of a plain FFN: of a layer without experts, or beside them."""
SITES = (EXPERTS, SHARED_EXPERT, DENSE)

CALLED = {EXPERTS: "experts", SHARED_EXPERT: "shared expert", DENSE: "dense FFN"}
"""Sites in words."""


def key_content(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A key whose fields include ``site``, as it is hashed and kept; see `site_entry`."""
    return {name: value for name, value in fields.items() if name != "site"} | site_entry(fields["site"])


def site_entry(site: str) -> dict[str, Any]:
    """What a key or an id says of a site: nothing of the routed experts, so that what is of them stays known."""
    return {} if site == EXPERTS else {"site": site}
