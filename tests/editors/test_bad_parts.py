"""An editor made of something else than hyper-parameters, a model and its tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import HyperParamsError, RequestError
from easyedit_moe.hparams import hyperparams_class

HPARAMS = hyperparams_class("MoE-FT").from_dict(
    {"alg_name": "MoE-FT", "model_name": "m", "layers": [1], "num_steps": 1, "dtype": "float32"}
)


@pytest.mark.parametrize("hparams", [None, {}, {"alg_name": "MoTE"}, 3, [HPARAMS], HyperParamsError])
def test_hyper_parameters_are_asked_for(hparams: Any) -> None:
    with pytest.raises(HyperParamsError, match="needs hyper-parameters"):
        make_editor(hparams)
    for make in (MoEEditor.from_hparams, lambda given: MoEEditor(given, tiny_model("qwen3_moe"), tiny_tokenizer())):
        with pytest.raises(HyperParamsError, match="hparams must be hyper-parameters of ours"):
            make(hparams)


@pytest.mark.parametrize(("model", "tok"), [("m", "t"), (None, tiny_tokenizer()), (tiny_tokenizer(), tiny_tokenizer())])
def test_a_model_and_a_tokenizer_are_asked_for(model: Any, tok: Any) -> None:
    with pytest.raises(RequestError, match="An editor needs a model and its tokenizer"):
        MoEEditor(HPARAMS, model, tok)
    with pytest.raises(RequestError, match="An editor needs a model and its tokenizer"):
        MoEEditor(HPARAMS, tiny_model("qwen3_moe"), "t")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["edit_requests", "edit", "batch_edit", "generate_edit"])
def test_requests_come_in_a_list_or_an_iterator(call: str) -> None:
    editor = MoEEditor(HPARAMS, tiny_model("qwen3_moe"), tiny_tokenizer())
    fact = {"prompt": "Angola is in", "subject": "Angola", "target_new": "Russia"}
    editor.model.generation_config.eos_token_id = list(range(400))
    run = getattr(editor, call)
    for bad in (0, 3.5, fact, "x", b"x"):
        with pytest.raises(RequestError, match="Requests must be a list"):
            run(requests=bad)
    metrics, *_ = run(requests=iter([fact]))
    assert metrics[0]["requested_rewrite"]["prompt"] == "Angola is in"
