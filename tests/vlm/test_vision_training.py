"""The tower that reads pictures, trained: its gradients are those of transformers' own forward."""

from __future__ import annotations

import pytest
import torch
from test_videos import as_transformers_takes_it, backend_of
from test_vlm import LOGP, move
from tiny_text import make_batch, make_requests
from tiny_vlm import make_config
from transformers import AutoModelForImageTextToText

from mmrl.errors import UserError
from mmrl.types import Prompt
from mmrl.weights import trainable
from vlm.estimate import describe, estimate_memory

LORA = {"rank": 4, "alpha": 8}
FORMS = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "whole"])


def trained_backend(folders, family, prompts, lora, **changes):
    model = {"train_vision": True, "lora": lora}
    return backend_of(folders, family, prompts, model=model, **changes)


def of_tower(named):
    return {name: value for name, value in named.items() if ".visual." in name}


def gradients_of(model):
    """By the names that a plain network gives its parameters, and peft the adapters in it."""
    known = model.named_parameters()
    found = {name.removeprefix("base_model.model."): p.grad for name, p in known if p.requires_grad}
    return {name.removeprefix("network."): value for name, value in found.items()}


def exported(folders, family, lora, folder):
    if lora is None:
        return AutoModelForImageTextToText.from_pretrained(folder)
    from peft import PeftModel

    base = AutoModelForImageTextToText.from_pretrained(folders[family])
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


@FORMS
@pytest.mark.parametrize("update", ["shared_prompt", "padded"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_gradients_are_those_of_transformers(folders, films, family, lora, update, tmp_path):
    backend = trained_backend(folders, family, films, lora, update=update)
    move(backend)
    groups = list(backend.rollout(make_requests(prompts=films, group_size=2)))
    batch = make_batch(backend, groups)
    backend.evaluate(batch, LOGP).logp.sum().backward()
    backend.export(tmp_path, "")
    model = exported(folders, family, lora, tmp_path).eval()
    for i, row in enumerate(batch.payload):
        inputs = as_transformers_takes_it(films[i // 2], row.prompt, family, row.completion)
        logp = model(**inputs).logits[0, len(row.prompt.ids) - 1 : -1].log_softmax(-1)
        logp[range(len(row.completion)), list(row.completion)].sum().backward()
    expected, found = gradients_of(model), gradients_of(backend.model)
    assert expected.keys() == found.keys()
    assert len(of_tower(found)) > 10
    largest = max(float(value.abs().max()) for value in of_tower(expected).values())
    assert largest > 0.01, "else there is nothing to compare"
    for name, value in expected.items():
        close = (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-5 * largest
        assert close, name


@FORMS
def test_every_part_of_the_tower_is_reached(folders, films, family, lora):
    backend = trained_backend(folders, family, films, lora)
    move(backend)
    groups = list(backend.rollout(make_requests(prompts=films, group_size=2)))
    backend.evaluate(make_batch(backend, groups), LOGP).logp.sum().backward()
    tower = of_tower(gradients_of(backend.model))
    # What is added behind the last layer reaches tokens that nobody reads any more.
    last = {name for name in tower if "deepstack_merger_list.1." in name}
    assert {name for name, value in tower.items() if not value.abs().max() > 0} == last
    modules = {name.split(".visual.")[1].split(".")[0] for name in tower}
    merged = {"merger"} | ({"deepstack_merger_list"} if family == "qwen3_vl" else set())
    assert modules >= {"blocks"} | merged


def test_pictures_of_a_group_pass_the_tower_once(folders, films, family):
    backend = trained_backend(folders, family, films, LORA)
    groups = list(backend.rollout(make_requests(prompts=films[:2], group_size=4)))
    batch, patches = make_batch(backend, groups), []
    tower = backend._network.base_model.visual
    tower.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    backend.evaluate(batch, LOGP)
    inputs = [group.payload.prompt.inputs for group in groups]
    images, videos = (
        sum(len(found[name]) for found in inputs if name in found)
        for name in ("pixel_values", "pixel_values_videos")
    )
    assert patches == [images, videos]


@FORMS
def test_texts_alone_score_and_train_as_without_a_tower(folders, films, family, lora):
    """The black picture in place of theirs changes no bit, and gives the tower a gradient of 0."""
    results = []
    for vision in (True, False):
        model = {"train_vision": vision, "lora": lora}
        backend = backend_of(folders, family, films, model=model)
        live = {k: v for k, v in trainable(backend.model).items() if ".visual." not in k}
        for name, parameter in live.items():
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        groups = list(backend.rollout(make_requests(prompts=films[-1:], group_size=3)))
        logp = backend.evaluate(make_batch(backend, groups), LOGP).logp
        logp.sum().backward()
        results.append((logp.detach(), gradients_of(backend.model)))
    (with_tower, found), (without, expected) = results
    assert torch.equal(with_tower, without)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    tower = of_tower(found)
    assert tower.keys() == found.keys() - expected.keys()
    assert all(torch.equal(value, torch.zeros_like(value)) for value in tower.values())


def test_a_kind_that_no_prompt_has_costs_nothing(folders, films, family):
    """Images and texts, but no video: one pass of the tower, with or without an image."""
    backend = trained_backend(folders, family, films[-2:], LORA)
    groups = list(backend.rollout(make_requests(prompts=films[-2:], group_size=2)))
    patches = []
    tower = backend._network.base_model.visual
    tower.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    for group in groups:
        backend.evaluate(make_batch(backend, [group]), LOGP)
    assert patches == [16, 4]


def test_training_nothing_is_refused(folders, films, family):
    lora = LORA | {"target_modules": ["q_proj"]}
    with pytest.raises(UserError, match=r"train_vision = true, but .*\['q_proj'\] names nothing"):
        trained_backend(folders, family, films, lora)
    text = [Prompt(id="t", text="go up", columns={"images": []})]
    with pytest.raises(UserError, match=r"no prompt has one of the columns \('images', 'image', "):
        trained_backend(folders, family, text, LORA)


@FORMS
@pytest.mark.parametrize("vision", [True, False])
def test_what_check_counts_is_what_is_built(folders, films, family, lora, vision):
    model = {"train_vision": vision, "lora": lora}
    config = make_config(folders[family], family, model=model)
    live = trainable(backend_of(folders, family, films, model=model).model)
    count = sum(parameter.numel() for parameter in live.values())
    assert f"trained: {count:,} parameters" in describe(config)[1]
    assert estimate_memory(config)["gradients_and_optimizer"] == 12 * count
