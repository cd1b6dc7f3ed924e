"""One file per method, and what they share; the table of methods says which class serves which method."""

from easyedit_moe.editors.adalora import AdaLoRAEditor, apply_adalora_to_model
from easyedit_moe.editors.base import Editor, EditResult, Patch
from easyedit_moe.editors.bcd_speedup import BCDSpeedupEditor, apply_bcd_speedup_to_model
from easyedit_moe.editors.global_ import GlobalEditor, apply_global_to_model
from easyedit_moe.editors.global_speedup import GlobalSpeedupEditor, apply_global_speedup_to_model
from easyedit_moe.editors.memoe import AdapterPatch, MEMoEEditor, apply_memoe_to_model
from easyedit_moe.editors.memory import EditMemory
from easyedit_moe.editors.moe_alphaedit import MoEAlphaEditEditor, apply_moe_alphaedit_to_model
from easyedit_moe.editors.moe_ft import MoEFTEditor, apply_moe_ft_to_model
from easyedit_moe.editors.moe_ft_l import MoEFTLEditor, apply_moe_ft_l_to_model
from easyedit_moe.editors.moe_lora import MoELoRAEditor, apply_moe_lora_to_model
from easyedit_moe.editors.moe_memit import MoEMEMITEditor, apply_moe_memit_to_model
from easyedit_moe.editors.moe_rome import MoEROMEEditor, apply_moe_rome_to_model
from easyedit_moe.editors.moeedit import MoEEditEditor, apply_moeedit_to_model
from easyedit_moe.editors.mote import MoTEEditor, apply_mote_to_model
from easyedit_moe.editors.prepared import Prepared
from easyedit_moe.editors.registry import editor_class, make_editor, method_names
from easyedit_moe.editors.solving import SolvingEditor
from easyedit_moe.editors.training import TrainingEditor
from easyedit_moe.editors.unke import UnKEEditor, apply_unke_to_model

__all__ = [
    "AdaLoRAEditor",
    "AdapterPatch",
    "BCDSpeedupEditor",
    "EditMemory",
    "EditResult",
    "Editor",
    "GlobalEditor",
    "GlobalSpeedupEditor",
    "MEMoEEditor",
    "MoEAlphaEditEditor",
    "MoEEditEditor",
    "MoEFTEditor",
    "MoEFTLEditor",
    "MoELoRAEditor",
    "MoEMEMITEditor",
    "MoEROMEEditor",
    "MoTEEditor",
    "Patch",
    "Prepared",
    "SolvingEditor",
    "TrainingEditor",
    "UnKEEditor",
    "apply_adalora_to_model",
    "apply_bcd_speedup_to_model",
    "apply_global_speedup_to_model",
    "apply_global_to_model",
    "apply_memoe_to_model",
    "apply_moe_alphaedit_to_model",
    "apply_moe_ft_l_to_model",
    "apply_moe_ft_to_model",
    "apply_moe_lora_to_model",
    "apply_moe_memit_to_model",
    "apply_moe_rome_to_model",
    "apply_moeedit_to_model",
    "apply_mote_to_model",
    "apply_unke_to_model",
    "editor_class",
    "make_editor",
    "method_names",
]
