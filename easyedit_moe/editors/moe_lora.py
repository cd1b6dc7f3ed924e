"""MoE-LoRA: low-rank adapters on the experts (peft), trained on the new answers and merged."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.editors.trainable import check_writable, expert_parameters, seeded, trainable
from easyedit_moe.editors.training import Masters, Step, TrainingEditor, TrainingJob
from easyedit_moe.editors.training_planner import Trained
from easyedit_moe.errors import DependencyError, LayoutError
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import LoRAHyperParams
from easyedit_moe.moe.holding import intact
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.model_state import ModelState

ADAPTER = "default"


class PeftEditor(TrainingEditor):
    """What MoE-LoRA and AdaLoRA share: adapters go in, are trained and taken out; their product is written by us.

    Weights do not change before: peft adds the product on the fly, and its own merging is not used, since
    that adds in the weights' dtype. Afterwards the modules, their classes and their attributes are those of before.
    """

    hparams: LoRAHyperParams

    def train(
        self, view: MoELayerView, tok: PreTrainedTokenizerBase, facts: Sequence[EditRequest], job: TrainingJob
    ) -> Mapping[str, Tensor]:
        """Train adapters, and give the adapted parameters with their products added."""
        peft, model = _peft(), view.model
        if isinstance(model, peft.PeftModel) or hasattr(model, "peft_config"):
            raise LayoutError("This model already has adapters of peft; call merge_and_unload() first.")
        config = self.config(peft, view, job)
        with trainable(model):
            with same_structure(model), seeded(model, self.hparams.seed):
                with warnings.catch_warnings():  # peft 0.18 does so for experts, whose parameters it adapts rightly
                    warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
                    wrapped = peft.get_peft_model(model, config, ADAPTER)
                model.eval()
                adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
                masters = Masters(adapters)
                job.fit(masters, *self.hooks(wrapped, masters))
                with torch.no_grad():
                    deltas = _deltas(model)
            return {name: model.get_parameter(name).detach().float() + delta for name, delta in deltas.items()}

    @abstractmethod
    def config(self, peft: Any, view: MoELayerView, job: TrainingJob) -> Any:
        """Peft's configuration: what is adapted, and how."""

    def hooks(self, wrapped: nn.Module, masters: Masters) -> tuple[Callable[[Step], None], Callable[[], Tensor] | None]:
        """What is done after each step, and what is added to the loss."""
        return (lambda step: None), None


class MoELoRAEditor(PeftEditor):
    """LoRA (arXiv 2106.09685) on the experts of the critical layers, one adapter per expert, merged after training.

    Where it differs from LoRA as editing papers run it (EasyEdit's code): that adapts q_proj and v_proj of every layer;
    here the experts are the site, through peft's ``target_parameters``. That serves packed experts, which have no
    module to adapt, and ModuleList experts alike: given their modules, peft would look for packed experts wherever
    transformers packs those of this model type. Such adapters can't drop out inputs, so there is no dropout (EasyEdit:
    0.1). The order of facts is ``minibatch`` unless the hparams say otherwise.
    """

    method = "MoE-LoRA"

    @classmethod
    def trained(cls, hparams: LoRAHyperParams, view: MoELayerView) -> Trained:
        """One adapter per expert and matrix; each forward multiplies it out to the size of the weights."""
        chosen = _expert_matrices(view, hparams).values()
        return adapters_of([tuple(p.shape) for p in chosen], hparams.rank, written=Trained.of(chosen), full=True)

    def config(self, peft: Any, view: MoELayerView, job: TrainingJob) -> Any:
        """LoRA on the experts' parameters, which peft addresses by name."""
        hp, chosen = self.hparams, _expert_matrices(view, self.hparams)
        check_writable(chosen)
        names = list(chosen)
        return peft.LoraConfig(
            r=hp.rank, lora_alpha=hp.lora_alpha, lora_dropout=0.0, target_modules=[], target_parameters=names
        )


def _expert_matrices(view: MoELayerView, hparams: LoRAHyperParams) -> dict[str, nn.Parameter]:
    """The experts' matrices that get adapters, by full name; biases do not."""
    found: dict[str, nn.Parameter] = {}
    for moe in view.require(hparams.layers):
        matrix = 3 if moe.experts.layout.storage == "packed" else 2
        chosen = expert_parameters(moe, hparams.train)
        found |= {name: parameter for name, parameter in chosen.items() if parameter.dim() == matrix}
    return found


def adapters_of(shapes: Sequence[tuple[int, ...]], rank: int, written: Trained, full: bool, state: int = 4) -> Trained:
    """Adapters of a rank beside matrices ``[.., a, b]``: ``rank (a + b)`` float32 numbers per matrix.

    Args:
        shapes: of the adapted parameters; packed experts have one matrix per expert.
        rank: of each adapter.
        written: the adapted parameters themselves, which get the product in the end.
        state: bytes of an adapter's number, and of what its method notes of it.
        full: whether each forward multiplies adapters out, as peft does for parameters that belong to no module.
    """
    numbers = sum(rank * (s[-2] + s[-1]) * (s[0] if len(s) == 3 else 1) for s in shapes)
    on_the_fly = written.numbers if full else 0
    return Trained(numbers, 4, written.written, written.largest, on_the_fly, written.numbers, state)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise DependencyError("MoE-LoRA and AdaLoRA need peft, which is not installed: pip install peft.") from error
    return peft


def _deltas(model: nn.Module) -> dict[str, Tensor]:
    """Change (float32) of each adapted parameter, by its name in the model without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    out = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            parameter = getattr(module, "parameter_name", "weight")
            plain = ".".join(part for part in name.split(".") if part != "base_layer")
            out[f"{plain}.{parameter}"] = module.get_delta_weight(ADAPTER).float()
    return out


@contextmanager
def same_structure(model: nn.Module) -> Iterator[None]:
    """Inside, modules may be replaced, wrapped and given attributes; afterwards all is where it was, in its order.

    Of each module the class, its attributes and the content of its dictionaries (parameters, submodules, hooks) are put
    back, not the values of tensors.
    """
    with intact(model):
        state = ModelState.of(model)
        try:
            yield
        finally:
            state.put_back_modules()


apply_moe_lora_to_model = MoELoRAEditor.apply_to_model
