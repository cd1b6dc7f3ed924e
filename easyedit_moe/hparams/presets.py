"""The one table of methods: what each is called, who edits with which hyper-parameters, and which settings define it.

Editors, hyper-parameters, EasyEdit's registration, the comparison, the commands and the documentation read this table.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from easyedit_moe.errors import MethodError, did_you_mean


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: what papers, tables, folders of YAML files and `alg_name` call it.
        editor: where its editor is, as "module:class"; imported when it is first needed.
        hparams: where its class of hyper-parameters is, likewise.
        edits: what it changes: "experts", "dense site" (weights beside the MoE blocks) or "adapter".
        source: paper or code that it comes from.
        fixed: settings that define it; an hparams file may not contradict them.
        statistics: whether it needs second moments of keys on a corpus.
        needs_subject: whether every fact must name its subject.
        depth: which layers the papers give it: the whole "window" of critical layers, its "last" one, or "all".
        host_name: EasyEdit's `alg_name`, for EasyEdit's own methods; None for ours.
    """

    name: str
    editor: str
    hparams: str
    edits: str
    source: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    statistics: bool = False
    host_name: str | None = None
    needs_subject: bool = True
    depth: str = "window"

    @property
    def code(self) -> str:
        """Whose code does it: "easyedit_moe" or "easyeditor"."""
        return "easyedit_moe" if self.host_name is None else "easyeditor"


def _ours(
    name: str,
    editor: str,
    hparams: str,
    source: str,
    fixed: Mapping[str, Any],
    edits: str = "experts",
    depth: str = "window",
) -> Method:
    editor, hparams = f"easyedit_moe.editors.{editor}", f"easyedit_moe.hparams.{hparams}"
    solves, trains = (f".{kind}:" in hparams for kind in ("solving", "training"))
    return Method(name, editor, hparams, edits, source, fixed, statistics=solves, needs_subject=not trains, depth=depth)


def _theirs(name: str, hparams: str, source: str, edits: str = "dense site", statistics: bool = False) -> Method:
    editor = "easyedit_moe.host.baselines:BaselineEditor"
    host_name = hparams.removesuffix("HyperParams")
    return Method(name, editor, f"easyeditor:{hparams}", edits, source, {}, statistics, host_name)


_MOTE, _MOEEDIT, _MEMIT = "arXiv 2605.16686", "arXiv 2602.10965", "arXiv 2210.07229"
_ALPHAEDIT, _ROME, _FT, _LORA = "arXiv 2410.02355", "arXiv 2202.05262", "arXiv 2012.00363", "arXiv 2106.09685"
_WISE = "arXiv 2405.14768"
_MEMIT_FIXED = {"metric": "covariance"}
_ALPHAEDIT_FIXED = {"metric": "nullspace", "remember_edits": True}
_ROME_FIXED = {"metric": "covariance", "spread": "residual", "edits_per_solve": 1, "max_layers": 1}

_TABLE: dict[str, Method] = {
    method.name: method
    for method in (
        _ours("MoE-FT", "moe_ft:MoEFTEditor", "training:FTHyperParams", _FT, {"norm_constraint": None},
              depth="last"),
        _ours("MoE-FT-L", "moe_ft_l:MoEFTLEditor", "training:FTHyperParams", _FT, {}, depth="last"),
        _ours("MoE-LoRA", "moe_lora:MoELoRAEditor", "training:LoRAHyperParams", _LORA, {}),
        _ours("AdaLoRA", "adalora:AdaLoRAEditor", "training:LoRAHyperParams", "arXiv 2303.10512", {}, "dense site",
              "all"),
        _ours("UnKE", "unke:UnKEEditor", "unke:UnKEHyperParams", "arXiv 2405.15349", {}),
        _ours("MEMoE", "memoe:MEMoEEditor", "memoe:MEMoEHyperParams", "arXiv 2405.19086", {}, "adapter"),
        _ours("MoE-ROME", "moe_rome:MoEROMEEditor", "solving:GlobalHyperParams", _ROME, _ROME_FIXED),
        _ours("MoE-MEMIT", "moe_memit:MoEMEMITEditor", "solving:GlobalHyperParams", _MEMIT, _MEMIT_FIXED),
        _ours("MoE-AlphaEdit", "moe_alphaedit:MoEAlphaEditEditor", "solving:GlobalHyperParams", _ALPHAEDIT,
              _ALPHAEDIT_FIXED),
        _ours("MoEEdit-BCD", "moeedit:MoEEditEditor", "solving:MoEEditHyperParams", _MOEEDIT, {}),
        _ours("BCD+speedup", "bcd_speedup:BCDSpeedupEditor", "solving:MoEEditHyperParams", _MOTE, {"spread": "update"}),
        _ours("Global+speedup", "global_speedup:GlobalSpeedupEditor", "solving:GlobalHyperParams", _MOTE,
              {"spread": "update"}),
        _ours("Global", "global_:GlobalEditor", "solving:GlobalHyperParams", "ours", {}),
        _ours("MoTE", "mote:MoTEEditor", "solving:MoTEHyperParams", _MOTE, {}),
        _theirs("ROME", "ROMEHyperParams", _ROME, statistics=True),
        _theirs("MEMIT", "MEMITHyperParams", _MEMIT, statistics=True),
        _theirs("AlphaEdit", "AlphaEditHyperParams", _ALPHAEDIT, statistics=True),
        _theirs("FT", "FTHyperParams", _FT, "experts"),
        _theirs("FT-L", "FTHyperParams", _FT, "experts"),
        _theirs("LoRA", "LoRAHyperParams", _LORA),
        _theirs("WISE", "WISEHyperParams", _WISE),
    )
}  # fmt: skip

REFUSED = {
    "GRACE": (
        "it looks for its key at one position, that of its last edit or of the first forward after generate is called, "
        "so that prompts scored together or by teacher forcing are asked at the wrong token; run it by EasyEdit's "
        "BaseEditor, whose scores of it need a tokenizer that writes a word alike with and without a space before it"
    ),
}
"""Methods of EasyEdit's that can't be rows of a comparison, and why."""

ALIASES = {"MoEEdit": "MoEEdit-BCD"}
"""Other names of methods of ours."""


def own_methods() -> list[Method]:
    """Methods of ours, in the order of the papers' tables, then those that were added."""
    return [method for method in _TABLE.values() if method.host_name is None]


def host_methods() -> list[Method]:
    """Methods of EasyEdit's own that we run beside ours."""
    return [method for method in _TABLE.values() if method.host_name is not None]


def find_method(name: str) -> Method:
    """The row of a method, ours or EasyEdit's, aliases resolved.

    Raises:
        MethodError: unknown; the message names the nearest method.
    """
    resolved = ALIASES.get(name, name)
    if resolved in REFUSED:
        raise MethodError(f"EasyEdit's {resolved} is not offered here: {REFUSED[resolved]}.")
    if resolved not in _TABLE:
        own = [method.name for method in own_methods()]
        hint = did_you_mean(name, [*_TABLE, *ALIASES])
        theirs = ", ".join(method.name for method in host_methods())
        raise MethodError(f"Unknown method {name!r}.{hint} Known: {', '.join(own)}. EasyEdit's: {theirs}.")
    return _TABLE[resolved]


def canonical_name(name: str) -> str:
    """The own name of a method of ours, aliases resolved.

    Raises:
        MethodError: unknown, or EasyEdit's; the message names the nearest method.
    """
    resolved = ALIASES.get(name, name)
    own = [method.name for method in own_methods()]
    if resolved not in own:
        hint = did_you_mean(name, [*own, *ALIASES])
        raise MethodError(f"Unknown method {name!r}.{hint} Known: {', '.join(own)}.")
    return resolved


def register_method(method: Method) -> None:
    """Add a row, so that a method from elsewhere is found by name like those that ship.

    Raises:
        MethodError: the name is taken by another method.
    """
    known = _TABLE.get(ALIASES.get(method.name, method.name))
    if known is not None and known != method:
        raise MethodError(f"The method name {method.name!r} is already taken, by {known.editor}.")
    _TABLE[method.name] = method


def located(location: str) -> Any:
    """What a location "module:name" of a row points at.

    Raises:
        MethodError: there is no such module, or no such name in it.
    """
    module, _, name = location.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MethodError(f"The table of methods points at {location}, which can't be imported: {error}") from error


def methods_of(hparams: type) -> tuple[str, ...]:
    """Names of the methods that a class of hyper-parameters serves, or else the nearest class that it derives from."""
    for cls in hparams.__mro__:
        location = f"{cls.__module__}:{cls.__qualname__}"
        names = tuple(method.name for method in _TABLE.values() if method.hparams == location)
        if names:
            return names
    return ()


class _FixedSettings(Mapping[str, Mapping[str, Any]]):
    def __getitem__(self, name: str) -> Mapping[str, Any]:
        method = _TABLE[name]
        if method.host_name is not None:
            raise KeyError(name)
        return method.fixed

    def __iter__(self) -> Iterator[str]:
        return iter([method.name for method in own_methods()])

    def __len__(self) -> int:
        return len(own_methods())


METHODS: Mapping[str, Mapping[str, Any]] = _FixedSettings()
"""Method of ours -> the settings that define it."""
