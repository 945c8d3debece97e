"""Contracts with transformers: what its own models and processors say of the same prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from stand_ins import install
from tiny_text import make_batch, make_requests
from tiny_vlm import VISION, make_backend, make_config, network, picture
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from mmrl.attention import Availability
from mmrl.card import usage
from mmrl.errors import UserError
from mmrl.resolve import resolve
from mmrl.text.layout import lay_out
from mmrl.types import Prompt
from mmrl.weights import trainable
from vlm.config import ImageConfig
from vlm.encoding import conversation
from vlm.images import images_in, open_image

WAYS = pytest.mark.parametrize("update", ["shared_prompt", "packed", "padded"])
LOGP = frozenset({"logp"})


def move(backend, scale=0.05):
    for parameter in trainable(backend.model).values():
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def plain(folder, prompt, completion):
    """Log-probabilities [K] as a user of transformers would compute them."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    ids = torch.tensor([[*prompt.ids, *completion]])
    kinds = (ids == processor.image_token_id).int()
    with torch.no_grad():
        options = {"mm_token_type_ids": kinds, **prompt.inputs} if prompt.inputs else {}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
    logp = logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
    return logp[range(len(completion)), list(completion)]


@WAYS
def test_scores_are_those_of_transformers(folders, prompts, family, update):
    backend = make_backend(folders[family], family, prompts, update=update)
    groups = list(backend.rollout(make_requests(prompts=prompts, group_size=2)))
    batch = make_batch(backend, groups)
    tokens = [ids for group in groups for ids in group.tokens]
    assert tokens == [row.completion for row in batch.payload]
    found = backend.evaluate(batch, LOGP).logp.detach()
    for i, row in enumerate(batch.payload):
        expected = plain(folders[family], row.prompt, row.completion)
        torch.testing.assert_close(found[i, : len(expected)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("update", ["shared_prompt", "packed"])
def test_gradients_are_those_of_the_padded_form(folders, prompts, family, update):
    gradients = []
    for way in (update, "padded"):
        backend = make_backend(folders[family], family, prompts, update=way)
        groups = list(backend.rollout(make_requests(prompts=prompts)))
        move(backend)
        backend.evaluate(make_batch(backend, groups), LOGP).logp.sum().backward()
        live = trainable(backend.model).values()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in live]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("name", ["flash", "xformers", "flex"])
def test_kernels_score_as_sdpa_does(folders, prompts, family, name, monkeypatch):
    install(monkeypatch)
    backend = make_backend(folders[family], family, prompts)
    move(backend)
    batch = make_batch(backend, list(backend.rollout(make_requests(prompts=prompts))))
    found = []
    for kernel in ("sdpa", name):
        backend.attention = Availability(kernel, True, "a stand-in")
        logp = backend.evaluate(batch, LOGP).logp
        live = trainable(backend.model).values()
        gradients = torch.autograd.grad(logp.sum(), list(live))
        found.append((logp.detach(), torch.cat([slope.flatten() for slope in gradients])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert (found[1][1] - found[0][1]).norm() < 1e-5 * found[0][1].norm()


def test_images_of_a_prompt_are_read_once_for_all_completions(folders, prompts, family):
    backend = make_backend(folders[family], family, prompts)
    groups = list(backend.rollout(make_requests(prompts=prompts)))
    rows = make_batch(backend, groups).payload
    shared, apart = (lay_out(rows, share_prompts=share).inputs for share in (True, False))
    assert len(shared["image_grid_thw"]) == 3, "one picture and two"
    assert len(apart["image_grid_thw"]) == 12
    assert len(apart["pixel_values"]) == 4 * len(shared["pixel_values"])


def test_pixels_follow_their_samples_in_any_order(folders, prompts, family):
    backend = make_backend(folders[family], family, prompts)
    groups = list(backend.rollout(make_requests(prompts=prompts, group_size=2)))
    rows = [(group, i) for group in groups for i in range(2)]
    whole = backend.evaluate(make_batch(backend, groups), LOGP).logp
    for order in ([3, 0, 5, 2, 1, 4], [5, 4], [2], [0, 2, 4]):
        payload, mask = backend.collate([rows[i] for i in order])
        batch = make_batch(backend, groups)
        batch = type(batch)(
            payload=payload,
            mask=mask,
            advantages=batch.advantages[order],
            weights=batch.weights[order],
        )
        found = backend.evaluate(batch, LOGP).logp
        width = mask.shape[1]
        expected = whole[order][:, :width]
        torch.testing.assert_close(found * mask, expected * mask, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [3, 64])
def test_groups_of_unlike_sizes_hold_the_samples_of_equal_ones(folders, prompts, family, size):
    backend = make_backend(folders[family], family, prompts, {"batch_size": size})
    requests = make_requests(group_size=5, prompts=prompts)
    equal = list(backend.rollout(requests))
    sizes = [5, 1, *[2] * (len(requests) - 2)]
    asked = [replace(r, group_size=n) for r, n in zip(requests, sizes, strict=True)]
    ragged = list(backend.rollout(asked))
    for request, group, whole in zip(asked, ragged, equal, strict=True):
        assert list(group.outputs) == list(whole.outputs[: request.group_size])
    together = backend.evaluate(make_batch(backend, ragged), LOGP).logp
    rows = (backend.evaluate(make_batch(backend, [group]), LOGP).logp for group in ragged)
    for row, other in zip(together, [row for logp in rows for row in logp], strict=True):
        torch.testing.assert_close(row[: len(other)], other, rtol=1e-5, atol=1e-5)


def test_greedy_completions_are_those_of_transformers(folders, prompts, family):
    backend = make_backend(
        folders[family], family, prompts, evaluation={"temperature": 0.0, "max_tokens": 6}
    )
    backend._forbidden = ()  # transformers may choose anything
    model = AutoModelForImageTextToText.from_pretrained(folders[family])
    for group in backend.rollout(make_requests(prompts=prompts, group_size=1), evaluation=True):
        prompt = group.payload.prompt
        ids = torch.tensor([prompt.ids])
        kinds = (ids == model.config.image_token_id).int()
        options = {"mm_token_type_ids": kinds, **prompt.inputs} if prompt.inputs else {}
        expected = model.generate(
            input_ids=ids,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )
        assert group.payload.samples[0].ids == expected[0, ids.shape[1] :].tolist()


def test_tokens_of_vision_are_never_sampled(folders, prompts, family):
    backend = make_backend(folders[family], family, prompts, {"max_tokens": 40, "temperature": 5.0})
    groups = list(backend.rollout(make_requests(prompts=prompts, group_size=16)))
    seen = {token for group in groups for sample in group.payload.samples for token in sample.ids}
    vision = set(backend._tokenizer.convert_tokens_to_ids(list(VISION)))
    assert vision == {3, 4, 5, 6}
    assert not seen & vision
    assert len(seen) > 30, "everything else is"


def test_what_is_never_sampled_is_said_and_known_to_a_correction(folders, prompts, family):
    """Scores are of all tokens; what the sampler found is of those that it may choose."""
    backend = make_backend(folders[family], family, prompts, {"temperature": 2.0})
    assert any("4 tokens that stand for images" in note for note in backend.notes)
    batch = make_batch(backend, list(backend.rollout(make_requests(prompts=prompts))))
    found = backend.evaluate(batch, frozenset({"logp", "logp_sampled"}))
    gap = (found.logp_sampled - found.logp.detach())[batch.mask]
    assert gap.min() > -1e-4, "no token is less likely without the forbidden ones"
    assert gap.max() > 1e-2


def test_the_tower_and_the_base_stay_as_they_are(folders, prompts, family):
    for lora in ({"rank": 4, "alpha": 8}, None):
        backend = make_backend(folders[family], family, prompts, model={"lora": lora})
        live = trainable(backend.model)
        assert live
        assert not any("visual" in name for name in live)
    before = network(family).state_dict()
    after = backend._network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_exports_load_in_transformers_and_peft(folders, prompts, family, lora, tmp_path):
    backend = make_backend(folders[family], family, prompts, model={"lora": lora})
    groups = list(backend.rollout(make_requests(prompts=prompts, group_size=2)))
    move(backend)
    batch = make_batch(backend, groups)
    expected = backend.evaluate(batch, LOGP).logp.detach()
    backend.export(tmp_path, "")
    if lora is None:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    else:
        from peft import PeftModel

        base = AutoModelForImageTextToText.from_pretrained(folders[family])
        model = PeftModel.from_pretrained(base, tmp_path)
    row = batch.payload[0]
    ids = torch.tensor([[*row.prompt.ids, *row.completion]])
    kinds = (ids == 5).int()
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=kinds, **row.prompt.inputs).logits
    logp = logits[0, len(row.prompt.ids) - 1 : -1].log_softmax(-1)
    found = logp[range(len(row.completion)), list(row.completion)]
    torch.testing.assert_close(found, expected[0, : len(found)], rtol=1e-4, atol=1e-4)
    assert AutoProcessor.from_pretrained(tmp_path).image_processor is not None
    ours, theirs = (GenerationConfig.from_pretrained(f) for f in (tmp_path, folders[family]))
    assert ours == theirs


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_code_on_the_card_runs(folders, prompts, family, lora, tmp_path, monkeypatch, capsys):
    backend = make_backend(folders[family], family, prompts, model={"lora": lora})
    backend.export(tmp_path, "")
    picture("red").save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    source = usage({"backend": {"name": "vlm", **backend.config.model_dump()}})
    exec(compile(source, "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") == 1


# Prompts


def kinds(prompt, images, videos=0):
    return [
        [part["type"] for part in message["content"]]
        if message["role"] == "user"
        else message["role"]
        for message in conversation(prompt, images, videos)
    ]


def test_images_stand_where_the_text_has_marks_or_before_it():
    marked = Prompt(id="", text="a <image> b <image>")
    assert kinds(marked, 2) == [["text", "image", "text", "image"]]
    assert kinds(Prompt(id="", text="a"), 2) == [["image", "image", "text"]]
    with pytest.raises(UserError, match=r"^a:7: prompt '<image> a' has places for 1 .* 2 images"):
        conversation(Prompt(id="", text="<image> a", where="a:7"), 2)


def test_images_of_a_conversation():
    system, turn = {"role": "system", "content": "s"}, {"role": "assistant", "content": "t"}
    user, parts = (
        {"role": "user", "content": "a"},
        [{"type": "image"}, {"type": "text", "text": "b"}],
    )
    last = {"role": "user", "content": parts}
    prompt = Prompt(id="", text="b", messages=(system, user, turn, last))
    assert kinds(prompt, 1) == ["system", ["text"], "assistant", ["image", "text"]]
    prompt = Prompt(id="", text="a", messages=(system, user))
    assert kinds(prompt, 2) == ["system", ["image", "image", "text"]]
    assert user["content"] == "a", "the prompt is left alone"
    with pytest.raises(UserError, match="has places for 1 images and 0 images"):
        conversation(Prompt(id="", text="b", messages=(last,)), 0)


def test_pictures_come_as_datasets_hold_them(tmp_path):
    path = tmp_path / "red.png"
    picture("red").save(path)
    assert isinstance(open_image({"bytes": path.read_bytes(), "path": None}), Image.Image)
    assert open_image({"bytes": None, "path": str(path)}) == str(path)
    assert open_image(picture("red")).size == (56, 56)


@pytest.mark.parametrize("entry", ["http://host/x.png", "file:///etc/passwd", 3, None])
def test_nothing_is_fetched_and_nothing_else_is_a_picture(entry):
    with pytest.raises(ValueError, match="neither a picture nor a path"):
        open_image(entry)


def test_a_column_that_no_prompt_has(folders, prompts, family):
    config = make_config(folders[family], family, images={"column": "image"})
    with pytest.raises(UserError, match=r"images.column = 'image'.* did you mean 'images'"):
        config.refuse_prompts(prompts)
    config = make_config(folders[family], family, videos={"column": "films"})
    with pytest.raises(UserError, match=r"videos.column = 'films': no prompt has this column"):
        config.refuse_prompts(prompts)
    make_config(folders[family], family).refuse_prompts([Prompt(id="", text="no pictures")])


def test_an_image_in_the_column_of_trl_is_seen(folders, prompts, family):
    path = prompts[0].columns["images"]
    alone = Prompt(id="alone", text="go up", columns={"image": path})
    backend = make_backend(folders[family], family, [prompts[0], alone])
    for name, value in backend._prompts["one"].inputs.items():
        torch.testing.assert_close(backend._prompts["alone"].inputs[name], value)
    assert backend._prompts["alone"].ids == backend._prompts["one"].ids


def test_the_column_of_trl_is_not_read_beside_another():
    prompt = Prompt(id="", text="", columns={"image": "a.png", "images": None})
    assert images_in(prompt, ImageConfig()) == []
    assert images_in(Prompt(id="", text="", columns={"image": "a.png"}), ImageConfig()) == ["a.png"]
    assert images_in(prompt, ImageConfig(column="picture")) == []


def test_prompts_without_anything_to_look_at_are_said(folders, prompts, family):
    config = make_config(folders[family], family)
    (note,) = config.prompt_notes([Prompt(id="", text="up", columns={"photo": "a.png"})], "here")
    assert "here: no prompt has an image or a video (columns 'images', 'image', 'videos'" in note
    assert config.prompt_notes(prompts, "here") == []
    film = Prompt(id="", text="", columns={"videos": "a.mp4"})
    assert config.prompt_notes([film], "here") == []


def test_an_unknown_family_is_named_with_its_key():
    with pytest.raises(UserError, match=r"backend.model.family: unknown name 'qwen3_v'.*qwen3_vl"):
        resolve("vision_models", "qwen3_v")


def test_an_image_that_is_not_there(folders, family):
    for entry in ("nowhere.png", {"bytes": None, "path": "nowhere.png"}):
        prompt = Prompt(id="x", text="go up", columns={"images": entry}, where="here.jsonl:7")
        with pytest.raises(UserError) as caught:
            make_backend(folders[family], family, [prompt])
        assert str(caught.value).startswith(
            "here.jsonl:7: prompt 'go up': backend.images.column = 'images' names 'nowhere.png', "
            "which is no file"
        )


def test_an_image_that_cannot_be_read(folders, family, tmp_path):
    path = tmp_path / "broken.png"
    path.write_text("no picture")
    prompt = Prompt(id="x", text="go up", columns={"image": [str(path)]}, where="here.jsonl:7")
    with pytest.raises(UserError) as caught:
        make_backend(folders[family], family, [prompt])
    assert str(caught.value).startswith(
        "here.jsonl:7: prompt 'go up': backend.images.column = 'image' has an image that cannot "
        f"be read, {str(path)!r}: cannot identify"
    )


def test_prompts_that_are_too_long(folders, prompts, family):
    with pytest.raises(UserError, match=r"tokens; allowed: 1 to 12 \(backend\.prompts\.max"):
        make_backend(folders[family], family, prompts, limit=12)


def test_limits_of_pixels(folders, prompts, family):
    small, large = (
        make_backend(folders[family], family, prompts, images={"min_pixels": 784, "max_pixels": n})
        for n in (4096, 40000)
    )
    sizes = [len(b._prompts["two"].inputs["pixel_values"]) for b in (small, large)]
    assert sizes[0] < sizes[1]
    with pytest.raises(ValidationError, match="min_pixels = 9 is more than max_pixels = 4"):
        make_backend(folders[family], family, prompts, images={"min_pixels": 9, "max_pixels": 4})


def test_a_text_model_is_no_vision_model(tmp_path, prompts, family):
    from tiny_text import save_model

    save_model(tmp_path, "qwen3")
    with pytest.raises(UserError, match="processor"):
        make_backend(tmp_path, family, prompts)
