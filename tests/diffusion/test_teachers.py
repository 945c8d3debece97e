"""Teachers of a distillation, adapters to start from, and what stays untouched by either."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_sd3 import make_batch, make_config

from diffusion.backend import build
from diffusion.estimate import describe, estimate_memory
from diffusion.lora import LORA_FILE
from diffusion.teachers import compare_with_runs
from mmrl.errors import UserError
from mmrl.types import Prompt, RolloutRequest
from mmrl.weights import trainable

NEEDS = frozenset({"mean_gap_teacher"})
TASKS = [
    Prompt(id="p", text="a red cat", columns={"task": "cats"}),
    Prompt(id="q", text="two dogs", columns={"task": "dogs"}),
]
ODE = {"name": "transition", "kernel": "ode", "noise_level": 0.0, "steps": {"before": 3}}


def make_student(folder, teachers=(), guidance=1.0, needs=NEEDS, prompts=TASKS, **model):
    config = make_config(folder, {"num_steps": 4, "guidance": guidance}, ODE, **model)
    chosen = {"teachers": [dict(teacher) for teacher in teachers]}
    return build(
        type(config).model_validate(config.model_dump() | chosen),
        device=torch.device("cpu"),
        prompts=prompts,
        seed=0,
        needs=needs,
    )


def move(backend, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(backend.model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def requests(prompts=TASKS):
    return [
        RolloutRequest(prompt=p, group_size=2, seed=3, stream=0, index=i)
        for i, p in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def policies(pipeline_folder, tmp_path_factory):
    """Two trained adapters of different rank, as run folders, and the backends behind them."""
    found = {}
    for seed, (task, rank) in enumerate({"cats": 4, "dogs": 2}.items()):
        backend = make_student(pipeline_folder, needs=frozenset(), lora={"rank": rank, "alpha": 8})
        move(backend, seed)
        run = tmp_path_factory.mktemp(task)
        backend.export(run / "final", "")
        found[task] = (run, backend)
    return found


def taught(policies, **changes):
    return [{"task": task, "path": str(run)} | changes for task, (run, _) in policies.items()]


def velocity(backend, prompt, states, sigma, guidance=1.0):
    with torch.no_grad():
        return backend._velocity_for([prompt.id] * len(states), guidance)(states, sigma)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_each_prompt_is_compared_with_its_own_teacher(pipeline_folder, policies, guidance):
    student = make_student(pipeline_folder, taught(policies, guidance=guidance))
    groups = list(student.rollout(requests()))
    terms = student.evaluate(make_batch(student, groups), NEEDS)
    assert not terms.step_std.any()
    for b, (group, index) in enumerate([(g, i) for g in groups for i in range(2)]):
        _, teacher = policies[group.request.prompt.columns["task"]]
        teacher._conditions = student._conditions
        path = group.payload[index]
        sigma = student._decisions._sigmas[:3]
        ours = velocity(student, group.request.prompt, path.states[:3], sigma)
        theirs = velocity(teacher, group.request.prompt, path.states[:3], sigma, guidance)
        size = terms.step_size[b]
        expected = size.square() * (ours - theirs).double().square().mean((1, 2, 3))
        torch.testing.assert_close(terms.mean_gap_teacher[b], expected, rtol=1e-4, atol=1e-10)
        assert (expected > 1e-6).all()


def test_with_split_weights_every_teacher_is_asked_by_every_process(
    pipeline_folder, policies, monkeypatch
):
    """A process whose samples need one teacher still takes part in the others' forwards."""
    student = make_student(pipeline_folder, taught(policies))
    groups = list(student.rollout(requests()))[:1]
    batch = make_batch(student, groups)
    alone = student.evaluate(batch, NEEDS).mean_gap_teacher
    calls = []
    ask = student._velocity
    monkeypatch.setattr(student, "_velocity", lambda *a: calls.append(len(a[0].keys)) or ask(*a))
    assert torch.equal(student.evaluate(batch, NEEDS).mean_gap_teacher, alone)
    assert calls == [2, 2]  # the teacher's and the student's own
    monkeypatch.setattr("diffusion.teachers.is_split", lambda model: True)
    calls.clear()
    assert torch.equal(student.evaluate(batch, NEEDS).mean_gap_teacher, alone)
    assert calls == [2, 1, 2]


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(pipeline_folder, policies):
    run, _ = policies["cats"]
    one = [{"task": task, "path": str(run)} for task in policies]
    student = make_student(pipeline_folder, one, lora={"rank": 4, "alpha": 8, "path": str(run)})
    groups = list(student.rollout(requests()))
    gap = student.evaluate(make_batch(student, groups), NEEDS).mean_gap_teacher
    gap.sum().backward()
    # The two adapters hold the same numbers: only the order of sums could differ.
    assert float(gap.detach().abs().max()) < 1e-12
    assert all(float(p.grad.abs().max()) < 1e-5 for p in trainable(student.model).values())


def test_updates_leave_teachers_alone_and_pull_the_student_to_them(pipeline_folder, policies):
    student = make_student(pipeline_folder, taught(policies))
    live = trainable(student.model)
    assert not any("teacher" in name for name in live)
    frozen = {n: p for n, p in student.model.named_parameters() if n not in live}
    before = {name: value.detach().clone() for name, value in frozen.items()}
    assert any("teacher0" in name for name in before)
    optimizer = torch.optim.Adam(live.values(), lr=3e-3)
    gaps = []
    for _ in range(10):
        groups = list(student.rollout(requests()))
        optimizer.zero_grad()
        gap = student.evaluate(make_batch(student, groups), NEEDS).mean_gap_teacher.mean()
        gap.backward()
        optimizer.step()
        gaps.append(gap.item())
    assert all(torch.equal(value, before[name]) for name, value in frozen.items())
    assert gaps[-1] < 0.7 * gaps[0]


def test_a_teacher_may_be_a_whole_network(pipeline_folder, tmp_path, policies):
    trained = make_student(pipeline_folder, needs=frozenset(), lora=None)
    move(trained, 5, scale=0.02)
    trained.export(tmp_path / "run" / "final", "")
    whole = [{"task": task, "path": str(tmp_path / "run")} for task in policies]
    student = make_student(pipeline_folder, whole)
    groups = list(student.rollout(requests()))
    gap = student.evaluate(make_batch(student, groups), NEEDS).mean_gap_teacher
    assert (gap > 0).all()
    same = make_student(pipeline_folder, whole, lora=None)
    same._bare.load_state_dict(trained._bare.state_dict())
    # Equal weights, but with and without gradients another kernel may compute.
    gap = same.evaluate(make_batch(same, groups), NEEDS).mean_gap_teacher
    assert float(gap.detach().max()) < 1e-12


def test_the_export_holds_the_student_only(pipeline_folder, policies, tmp_path):
    student = make_student(pipeline_folder, taught(policies))
    student.export(tmp_path, "")
    names = load_file(tmp_path / LORA_FILE).keys()
    assert names == load_file(policies["cats"][0] / "final" / LORA_FILE).keys()
    assert not any("teacher" in name for name in names)


def test_an_adapter_to_start_from(pipeline_folder, policies):
    run, source = policies["cats"]
    student = make_student(
        pipeline_folder, needs=frozenset(), lora={"rank": 4, "alpha": 8, "path": str(run)}
    )
    weights = trainable(student.model)
    assert all(torch.equal(weights[n], value) for n, value in trainable(source.model).items())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "has r = 4, but model.lora says 8"),
        ({"alpha": 4}, "has lora_alpha = 8.*says 4"),
        ({"target_modules": ["to_q"]}, "adapter of other modules"),
        ({"path": "no/such/run"}, "holds no pytorch_lora_weights.safetensors"),
    ],
)
def test_an_adapter_that_does_not_fit(pipeline_folder, policies, lora, message):
    path = str(policies["cats"][0])
    with pytest.raises(UserError, match=message):
        make_student(pipeline_folder, lora={"rank": 4, "alpha": 8, "path": path} | lora)


def test_an_adapter_with_the_wrong_shape(pipeline_folder, policies, tmp_path):
    source = policies["cats"][0] / "final" / LORA_FILE
    state = {name: value[:, :2].clone() for name, value in load_file(source).items()}
    about = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    save_file(state, tmp_path / LORA_FILE, metadata=about)
    with pytest.raises(UserError, match="does not fit"):
        make_student(pipeline_folder, lora={"rank": 4, "alpha": 8, "path": str(tmp_path)})


def test_a_file_that_does_not_say_its_alpha_has_the_rank_as_alpha(
    pipeline_folder, policies, tmp_path
):
    state = load_file(policies["cats"][0] / "final" / LORA_FILE)
    save_file(state, tmp_path / LORA_FILE)
    path = str(tmp_path)
    make_student(pipeline_folder, lora={"rank": 4, "alpha": 4, "path": path})
    with pytest.raises(UserError, match=r"has lora_alpha = 4, but model\.lora says 8"):
        make_student(pipeline_folder, lora={"rank": 4, "alpha": 8, "path": path})
    save_file(
        state,
        tmp_path / LORA_FILE,
        metadata={"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})},
    )
    with pytest.raises(UserError, match="made with use_dora"):
        make_student(pipeline_folder, lora={"rank": 4, "alpha": 4, "path": path})


def test_weights_that_are_missing_are_found_without_loading_a_model(pipeline_folder, policies):
    cats, dogs = taught(policies)
    config = make_student(pipeline_folder, [cats, dogs]).config
    describe(config)
    gone = type(config).model_validate(
        config.model_dump() | {"teachers": [cats, dogs | {"path": "nowhere"}]}
    )
    with pytest.raises(UserError, match="path = 'nowhere' holds no"):
        describe(gone)


def test_mistakes_with_teachers(pipeline_folder, policies):
    cats, dogs = taught(policies)
    with pytest.raises(UserError, match="none has the task 'dogs' of prompt 'two dogs'"):
        make_student(pipeline_folder, [cats]).config.refuse_prompts(TASKS)
    with pytest.raises(UserError, match="cannot hold"):
        make_student(pipeline_folder, [cats, dogs], lora=None)
    with pytest.raises(UserError, match=r"no pytorch_lora_weights\.saf.* and holds no transf"):
        make_student(pipeline_folder, [cats | {"path": "nowhere"}, dogs])
    with pytest.raises((UserError, ValueError), match="need likelihood 'transition'"):
        make_config(pipeline_folder).model_validate(
            make_config(pipeline_folder).model_dump() | {"teachers": [cats]}
        )
    with pytest.raises((UserError, ValueError), match="'cats' has more than one teacher"):
        make_student(pipeline_folder, [cats, cats])


def test_teachers_are_loaded_only_where_they_are_asked(pipeline_folder, policies):
    cats, dogs = taught(policies)
    gone = [cats | {"path": "nowhere"}, dogs]
    drawing = make_student(pipeline_folder, gone, needs=frozenset())
    assert not any("teacher" in name for name, _ in drawing.model.named_parameters())
    assert len(list(drawing.rollout(requests(), evaluation=True))) == 2
    with pytest.raises(UserError, match="path = 'nowhere' holds no"):
        make_student(pipeline_folder, gone)


# ---------------------------------------------------------------- a teacher's own run


@pytest.fixture
def recorded(policies, pipeline_folder, tmp_path):
    """``recorded(rollout={...}, path=..., network=False)``: teacher of cats in a run folder."""

    def make(rollout=None, path=pipeline_folder, network=False):
        run = tmp_path / "cats"
        if network:
            shutil.copytree(pipeline_folder / "transformer", run / "final" / "transformer")
        else:
            shutil.copytree(policies["cats"][0] / "final", run / "final")
        backend = make_config(path, {"guidance": 1.0} | (rollout or {})).model_dump(mode="json")
        (run / "config.yaml").write_text(yaml.safe_dump({"backend": {"name": "d", **backend}}))
        return run

    return make


def student_of(folder, run, **teacher):
    """Configuration of a student with this teacher alone."""
    config = make_config(folder, {"guidance": 2.0}, ODE)
    one = [{"task": "cats", "path": str(run), "guidance": 1.0} | teacher]
    return type(config).model_validate(config.model_dump() | {"teachers": one})


def test_a_teacher_used_as_in_its_own_run_is_no_matter(pipeline_folder, recorded, tmp_path):
    link = tmp_path / "same-model"
    link.symlink_to(pipeline_folder)
    run = recorded(path=link)
    for path in (run, run / "final"):
        assert compare_with_runs(student_of(pipeline_folder, path)) == []


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"guidance": 4.5}, "guidance = 1, but its own run had rollout.guidance = 4.5"),
        ({"shift": 2.0}, "rollout.shift = 3, but its own run had rollout.shift = 2"),
        (
            {"grid": "linspace_shifted"},
            "rollout.grid = diffusers_default, but its own run had rollout.grid = linspace_shifted",
        ),
        (
            {"shift_terminal": 0.02},
            "rollout.shift_terminal = null, but its own run had rollout.shift_terminal = 0.02",
        ),
    ],
)
def test_other_settings_than_in_its_own_run_are_said(pipeline_folder, recorded, rollout, said):
    run = recorded(rollout)
    config = student_of(pipeline_folder, run)
    expected = f"warning: teachers[0] ({run}): {said}"
    assert compare_with_runs(config) == [expected]
    assert describe(config).count(expected) == 1
    built = build(config, device=torch.device("cpu"), prompts=TASKS[:1], seed=0, needs=NEEDS)
    assert list(built.notes).count(expected) == 1
    # As it was trained: nothing to say.
    if "guidance" in rollout:
        assert compare_with_runs(student_of(pipeline_folder, run, guidance=4.5)) == []


def test_an_adapter_of_another_model_is_refused(pipeline_folder, recorded, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    run = recorded(path=other)
    match = r"teachers\[0\] \(.*cats\) is an adapter of another model.*tiny-sd3.*other'; allowed"
    config = student_of(pipeline_folder, run)
    for ask in (
        describe,
        lambda c: build(c, device=torch.device("cpu"), prompts=TASKS, seed=0, needs=NEEDS),
    ):
        with pytest.raises(UserError, match=match):
            ask(config)
    other.rmdir()  # it may have been moved, and be the same
    (line,) = compare_with_runs(config)
    assert f"but its own run had model.path = {str(other)!r}" in line


def test_models_of_a_hub_are_told_apart_by_name(recorded):
    run = recorded(path="owner/one")
    assert compare_with_runs(student_of("owner/one", run)) == []
    with pytest.raises(UserError, match=r"'owner/two', but its own run .* 'owner/one'"):
        compare_with_runs(student_of("owner/two", run))


def test_a_network_of_its_own_may_come_from_another_model(pipeline_folder, recorded, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (line,) = compare_with_runs(student_of(pipeline_folder, recorded(path=other, network=True)))
    assert "model.path" in line


def test_a_record_that_cannot_be_read_is_said(pipeline_folder, recorded):
    run = recorded()
    (run / "config.yaml").write_text("backend: {name: other, model: {path: x}, tokens: 3}")
    (line,) = compare_with_runs(student_of(pipeline_folder, run))
    assert "not compared with its own run" in line
    assert "unknown key 'tokens'" in line


# ---------------------------------------------------------------- memory


def held(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_of_teachers_that_are_adapters(pipeline_folder, policies, dtype):
    student = make_student(pipeline_folder, taught(policies), dtype=dtype)
    adapters = [p for name, p in student.model.named_parameters() if ".teacher" in name]
    assert estimate_memory(student.config)["teachers"] == held(*adapters) > 0
    assert "teachers" not in estimate_memory(make_student(pipeline_folder).config)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_of_teachers_with_networks_of_their_own(
    pipeline_folder, policies, dtype, lora, tmp_path
):
    shutil.copytree(pipeline_folder / "transformer", tmp_path / "final" / "transformer")
    whole = taught(policies, path=str(tmp_path))
    student = make_student(pipeline_folder, whole, dtype=dtype, lora=lora)
    networks = student._teachers.networks
    assert len(networks) == 2
    parameters = [p for network in networks for p in network.parameters()]
    assert estimate_memory(student.config)["teachers"] == held(*parameters)
