"""What is refused before training starts, and what `mmrl check` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrl import demonstrations, facts, targets
from mmrl.config import Part, RunConfig
from mmrl.divergences import ESTIMATORS
from mmrl.errors import UserError
from mmrl.needs import asked_before_updates, asked_of_updates, asks_survey
from mmrl.prompts.dataset import load_prompts
from mmrl.reduction import OVER_SAMPLES
from mmrl.resolve import backend_module, names, resolve
from mmrl.schema import nearest
from mmrl.types import TASK, Prompt
from rewards.combine import RewardSpec


def refuse_unless_consistent(config: RunConfig) -> None:
    """``UserError`` for combinations of valid options that cannot work together."""
    demonstrations.refuse_misused(config)
    refuse_missing_terms(config)
    training = config.training
    refuse_small_groups(config)
    needs_horizon = training.aggregation == "sample_sum_over_horizon"
    if needs_horizon != (training.horizon is not None):
        raise UserError(
            f"training.horizon: {training.horizon} with training.aggregation "
            f"{training.aggregation!r}; set it with sample_sum_over_horizon, and only then"
        )
    if training.count_empty and training.aggregation not in OVER_SAMPLES:
        raise UserError(
            f"training.count_empty: true with training.aggregation {training.aggregation!r}, "
            "which is no mean over samples; allowed with it: false, or one of "
            + ", ".join(OVER_SAMPLES)
        )
    refuse_split_samples(config)
    refuse_unreached_lengths(config)
    refuse_ignored_weights(config)
    refuse_misread_advantages(config)
    refuse_missing_facts(config)
    refuse_contradictions(config)
    refuse_misplaced_tempering(config)
    refuse_repeated_samples(config)
    refuse_misused_stale(config)
    samples = training.prompts_per_step * training.group_size
    whole = getattr(config.objective.module, "WHOLE_GROUPS", False)
    if whole and training.updates_per_epoch > training.prompts_per_step:
        raise UserError(
            f"training.updates_per_epoch: {training.updates_per_epoch} is more than the "
            f"{training.prompts_per_step} groups of a step (training.prompts_per_step), which "
            f"objective {config.objective.name!r} keeps whole"
        )
    if training.updates_per_epoch > samples:
        raise UserError(
            f"training.updates_per_epoch: {training.updates_per_epoch} is more than the {samples} "
            "samples of a step (training.prompts_per_step x training.group_size)"
        )


def refuse_small_groups(config: RunConfig) -> None:
    """``UserError`` for groups too small for what compares their samples."""
    smallest, _ = group_sizes(config)
    key = "training.group_size" if config.prompts.budget is None else "prompts.budget"
    parts = [("advantage", config.advantage), ("objective", config.objective)]
    parts += [("selection", part) for part in config.selection]
    for kind, part in parts:
        minimum = getattr(part.module, "MIN_GROUP_SIZE", 1)
        if smallest < minimum:
            raise UserError(
                f"{key}: groups of {smallest} are too small for {kind} {part.name!r}, "
                f"which compares the samples of a group; allowed: {minimum} or more"
            )


def group_sizes(config: RunConfig) -> tuple[int, int]:
    """Samples of the smallest and the largest group of a step.

    ``UserError`` for a budget that the run cannot spend.
    """
    budget, training = config.prompts.budget, config.training
    if budget is None:
        return training.group_size, training.group_size
    if training.refills:
        raise UserError(
            f"prompts.budget: {budget.name!r} spends a fixed number of samples, to which "
            f"training.refills: {training.refills} would add; allowed: 0"
        )
    return budget.module.bounds(budget.config, training.group_size)


def refuse_ignored_weights(config: RunConfig) -> None:
    """``UserError`` if the advantage weighs rewards itself and differs from the list of rewards."""
    module, options = config.advantage.module, config.advantage.config
    if not hasattr(module, "reward_weights"):
        return
    weights = module.reward_weights(options, [spec.label for spec in config.rewards])
    if weights and config.kl_in_reward is not None:
        raise UserError(
            f"kl_in_reward: advantage {config.advantage.name!r} normalises each reward by itself, "
            "so it would not see what is taken off their sum; use an advantage that does, or "
            "regularisers: kl_reference"
        )
    for spec in config.rewards:
        own = weights.get(spec.label, spec.weight)
        if spec.weight not in (1.0, own):
            raise UserError(
                f"rewards: {spec.label!r} has weight {spec.weight:g}, but advantage "
                f"{config.advantage.name!r} gives it {own:g}; say {spec.label}: {spec.weight:g} in "
                "advantage.weights"
            )


def refuse_misread_advantages(config: RunConfig) -> None:
    """``UserError`` unless probabilities reach just the objective that reads them as such."""
    makers = [i for i, part in enumerate(config.modulators) if makes_probabilities(part)]
    reads = getattr(config.objective.module, "READS_PROBABILITIES", False)
    if reads and makers != [len(config.modulators) - 1]:
        raise UserError(
            f"objective: {config.objective.name!r} reads advantages as probabilities; put the "
            "modulator 'optimality' last, and only once"
        )
    if makers and not reads:
        name = config.modulators[makers[0]].name
        raise UserError(
            f"modulators[{makers[0]}]: {name!r} makes probabilities of advantages, which objective "
            f"{config.objective.name!r} would take for advantages; it belongs to 'nft'"
        )


def refuse_misplaced_tempering(config: RunConfig) -> None:
    """``UserError`` if decisions get advantages of their own that would not reach the objective."""
    for i, part in enumerate(config.modulators):
        if not getattr(part.module, "TEMPERS", False):
            continue
        if i + 1 < len(config.modulators):
            raise UserError(
                f"modulators[{i + 1}]: {config.modulators[i + 1].name!r} would change advantages "
                f"after {part.name!r} has given decisions their own; put {part.name!r} last"
            )
        objective = config.objective
        if takes_samples_together(objective):
            raise UserError(
                f"modulators[{i}]: {part.name!r} gives decisions advantages of their own, but "
                f"objective {objective.name!r} takes the decisions of a sample together; use one "
                "that does not (objective.importance: decision)"
            )
        if getattr(objective.module, "IGNORES_SIGN", False):
            raise UserError(
                f"modulators[{i}]: {part.name!r} may change the sign of an advantage, which "
                f"objective {objective.name!r} does not read"
            )
        if "logp" not in objective.module.needs(objective.config):
            raise UserError(
                f"modulators[{i}]: {part.name!r} weighs log-probabilities, which objective "
                f"{objective.name!r} does not train"
            )


def refuse_repeated_samples(config: RunConfig) -> None:
    """``UserError`` if a loss compares samples of which a selection makes others count twice."""
    parts = [("objective", config.objective)]
    weighed = [p for p in config.regularisers if p.config.coef]  # type: ignore[attr-defined]
    parts += [("regularisers", part) for part in weighed]
    coupled = [
        f"{where}: {part.name!r}"
        for where, part in parts
        if asks_survey(part) or getattr(part.module, "WHOLE_GROUPS", False)
    ]
    for i, part in enumerate(config.selection):
        if coupled and getattr(part.module, "REPEATS_SAMPLES", False):
            raise UserError(
                f"selection[{i}]: {part.name!r} leaves few samples of a group, some several times, "
                f"but {coupled[0]} compares the samples with each other; leave one out"
            )


def refuse_misused_stale(config: RunConfig) -> None:
    """``UserError`` where samples of earlier steps cannot be kept, or would be trained wrongly."""
    stale, size = config.training.stale, config.training.prompts_per_step
    if stale is None:
        return
    who = f"training.stale: {{steps: {stale.steps}, groups: {stale.groups}}}"
    if stale.groups > stale.steps * size:
        raise UserError(
            f"training.stale.groups: {stale.groups} is more than the {stale.steps * size} groups "
            f"that are kept at most (training.stale.steps: {stale.steps} x "
            f"training.prompts_per_step: {size}); allowed: {stale.steps * size} or less"
        )
    if not getattr(config.backend.config, "keeps_samples", False):
        raise UserError(
            f"{who}: backend {config.backend.name!r} cannot save its samples; allowed with it: null"
        )
    if config.selection:
        raise UserError(
            f"{who} adds samples that selection[0]: {config.selection[0].name!r} does not see; "
            "allowed with it: selection: []"
        )
    for i, part in enumerate(config.modulators):
        if getattr(part.module, "TEMPERS", False) or hasattr(part.module, "learn"):
            raise UserError(
                f"{who}: modulators[{i}]: {part.name!r} asks the policy that sampled, or learns "
                "from the update, and would take kept samples for fresh ones; leave one out"
            )
    _refuse_losses_of_fresh_samples(config, who)


def _refuse_losses_of_fresh_samples(config: RunConfig, who: str) -> None:
    objective, parts = config.objective, config.regularisers
    if not getattr(objective.module, "TAKES_STALE", False):
        raise UserError(
            f"{who}: objective {objective.name!r} does not weigh samples of earlier policies by "
            "their ratio; allowed: null, or an objective that does, such as r2vpo or grpo"
        )
    for i, part in enumerate(parts):
        if not part.config.coef:  # type: ignore[attr-defined]
            continue
        if not getattr(part.module, "TAKES_STALE", False):
            raise UserError(
                f"{who}: regularisers[{i}]: {part.name!r} is not made for samples of earlier "
                "policies; allowed: null, or a regulariser that is, such as kl_reference"
            )
        estimator = getattr(part.config, "estimator", None)
        if estimator in ESTIMATORS and not getattr(part.config, "ratio_weighted", False):
            raise UserError(
                f"regularisers[{i}].ratio_weighted: false takes samples for those of the present "
                f"policy, to which {who} adds others; allowed with it and {estimator}: true"
            )
    for name, needs in asked_of_updates(config):
        if "mean_gap_old" in needs:
            raise UserError(
                f"{who}: {name} compares means with those of the policy that sampled, which are "
                "not kept; allowed with it: null"
            )


def takes_samples_together(objective: Part) -> bool:
    """Whether the loss of a decision depends on others, by the importance or by its nature."""
    whole = getattr(objective.module, "needs_whole_samples", None)
    if asks_survey(objective) or (whole is not None and whole(objective.config)):
        return True
    return getattr(objective.config, "importance", None) == "sample"


def makes_probabilities(part: Part) -> bool:
    """Whether a modulator's values are probabilities, where 0 means bad."""
    return getattr(part.module, "MAKES_PROBABILITIES", False)


def refuse_missing_facts(config: RunConfig) -> None:
    """``UserError`` if an estimator or a modulator reads of samples what nothing finds out."""
    labels = [spec.label for spec in config.rewards]
    for where, part in _estimating(config):
        missing = sorted(facts.reads(part) - facts.found_in(config))
        if missing == ["answer"] and not facts.draws_texts(config):
            raise UserError(
                f"{where}: {part.name!r} compares answers, which stand in texts; backend "
                f"{config.backend.name!r} draws none"
            )
        if missing == ["answer"]:
            raise UserError(
                f"{where}: {part.name!r} compares answers, and no reward says where they stand; "
                "add one that does, such as {name: exact_match, where: boxed, weight: 0}"
            )
        if missing:
            raise UserError(
                f"{where}: {part.name!r} reads {', '.join(missing)} of the samples, which nothing "
                f"finds out yet; there are {', '.join(sorted(facts.found_in(config)))}"
            )
        label = getattr(part.config, "reward", None)
        if label is not None and label not in labels:
            raise UserError(f"{where}.reward: no reward {label!r}; {nearest(label, labels)}")


def refuse_contradictions(config: RunConfig) -> None:
    """``UserError`` for an estimator or a modulator that undoes, or is undone by, something else.

    A module says what it is: ``RECENTRES`` (a modulator after which advantages have mean 0),
    ``LEARNS_FROM_EQUAL_REWARDS`` (an estimator), ``OWN_ADVANTAGE`` (an estimator, or an objective
    that compares samples itself), ``refuse(config, num_groups, group_size)`` with the size of the
    smallest group.
    """
    advantage, training = config.advantage, config.training
    if all(getattr(part.module, "OWN_ADVANTAGE", False) for part in (advantage, config.objective)):
        plain = [n for n in names("advantages") if not _brings_advantage(n)]
        raise UserError(
            f"advantage: {advantage.name!r} judges samples in a way of its own, and so does "
            f"objective {config.objective.name!r}; allowed with it: {', '.join(plain)}"
        )
    if training.refills and getattr(advantage.module, "LEARNS_FROM_EQUAL_REWARDS", False):
        raise UserError(
            f"training.refills: {training.refills} leaves out groups whose samples all earned the "
            f"same, from which advantage {advantage.name!r} learns; allowed with it: 0"
        )
    kept = [part for part in config.modulators if not makes_probabilities(part)]
    for i, part in enumerate(kept[:-1]):
        if getattr(part.module, "RECENTRES", False):
            raise UserError(
                f"modulators[{i}]: {part.name!r} gives advantages mean 0, which "
                f"{kept[i + 1].name!r} after it takes away again; put it last"
            )
    refuse = getattr(advantage.module, "refuse", None)
    if refuse is not None:
        refuse(advantage.config, training.prompts_per_step, group_sizes(config)[0])


def _brings_advantage(name: str) -> bool:
    return getattr(resolve("advantages", name), "OWN_ADVANTAGE", False)


def _estimating(config: RunConfig) -> list[tuple[str, Part]]:
    """The estimator and the modulators, with where they stand in the file."""
    modulators = [(f"modulators[{i}]", part) for i, part in enumerate(config.modulators)]
    return [("advantage", config.advantage), *modulators]


def refuse_split_samples(config: RunConfig) -> None:
    """``UserError`` if one ratio for a sample is asked of forwards that see only a part of it."""
    decisions = config.backend.config.num_decisions  # type: ignore[attr-defined]
    size = config.training.micro_batch_size
    asked = {"objective.importance": getattr(config.objective.config, "importance", None)}
    if config.correction is not None:
        asked["correction.level"] = getattr(config.correction.config, "level", None)
    who = [f"{key} 'sample'" for key, value in asked.items() if value == "sample"]
    whole = getattr(config.objective.module, "needs_whole_samples", None)
    if whole is not None and whole(config.objective.config):
        who.append(f"objective {config.objective.name!r}")
    if who and decisions is not None and size < decisions:
        raise UserError(
            f"training.micro_batch_size: {size} splits the {decisions} decisions of a sample, "
            f"which {who[0]} needs together; allowed: {decisions} or more"
        )


def refuse_unreached_lengths(config: RunConfig) -> None:
    """``UserError`` for a reward that counts tokens where there are none, or never enough."""
    longest = getattr(config.backend.config, "max_tokens", None)
    for i, spec in enumerate(config.rewards):
        if not getattr(spec.config, "counts_tokens", False):
            continue
        if longest is None:
            raise UserError(
                f"rewards[{i}]: {spec.label!r} counts tokens, which the samples of backend "
                f"{config.backend.name!r} do not have"
            )
        free = getattr(spec.config, "free_tokens", -1)
        if free >= longest:
            raise UserError(
                f"rewards[{i}]: {spec.label!r} costs nothing up to max_tokens - buffer = {free} "
                f"tokens, and no completion has more than {longest} "
                "(backend.rollout.max_tokens): it would always be 0; allowed: a difference "
                f"below {longest}"
            )


def refuse_missing_terms(config: RunConfig) -> None:
    """``UserError`` if a part needs a term that the backend's likelihood does not provide."""
    provided = config.backend.config.provides  # type: ignore[attr-defined]
    asked = [*asked_of_updates(config), *asked_before_updates(config)]
    for who, needs in asked:
        missing = sorted(needs - provided)
        if missing:
            settings = getattr(config.backend.config, "comes_with", {})
            remedies = [
                f"{term} comes with {settings[term]}; " for term in missing if term in settings
            ]
            raise UserError(
                f"{who} needs {', '.join(missing)}, which backend "
                f"{config.backend.name!r} with this likelihood does not provide; "
                + "".join(remedies)
                + f"it provides {', '.join(sorted(provided))}"
            )


@dataclass(frozen=True)
class MicroBatchShape:
    """``samples`` of a micro-batch, and the runs of ``decisions`` it takes to see all of theirs."""

    samples: int
    decisions: list[slice]


def micro_batch_shape(num_decisions: int | None, size: int) -> MicroBatchShape:
    """At most ``size`` decisions at once; samples, if theirs cannot be evaluated apart."""
    if num_decisions is None:
        return MicroBatchShape(size, [slice(0, None)])
    runs = range(0, num_decisions, min(size, num_decisions))
    decisions = [slice(start, min(start + size, num_decisions)) for start in runs]
    return MicroBatchShape(max(1, size // num_decisions), decisions)


def load_prompt_sets(config: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Training and evaluation prompts, checked against what the run asks of them."""
    keys, template = config.prompts.keys, config.prompts.template
    required = demonstrations.keys_of(config)
    training = load_prompts(config.prompts.source, "prompts.source", required, template)
    size = config.training
    count = size.prompts_per_step * (1 + size.refills)
    if count > len(training):
        with_refills = f" x (1 + {size.refills} training.refills)" if size.refills else ""
        raise UserError(
            f"training.prompts_per_step: {size.prompts_per_step}{with_refills} is more than the "
            f"{len(training)} prompts in {config.prompts.source}"
        )
    refuse_prompts = getattr(config.backend.config, "refuse_prompts", None)
    if refuse_prompts is not None:
        refuse_prompts(training)
    refuse_unknown_tasks(config.rewards, training, "rewards")
    source, judges = config.evaluation.source, config.evaluation.rewards
    own = keys if config.evaluation.keys is None else config.evaluation.keys
    evaluation = load_prompts(source, "evaluation.source", own, template) if source else []
    refuse_unknown_tasks(judges if evaluation else [], evaluation, "evaluation.rewards")
    targets.refuse_missing_columns(config.rewards, training, "rewards")
    targets.refuse_missing_columns(judges, evaluation, "evaluation.rewards")
    evaluation = evaluation[: config.evaluation.max_prompts]
    refuse_missing_files = getattr(config.backend.config, "refuse_missing_files", None)
    if refuse_missing_files is not None:
        refuse_missing_files([*training, *evaluation])
    return training, evaluation


def prompt_notes(
    config: RunConfig, training: Sequence[Prompt], evaluation: Sequence[Prompt]
) -> list[str]:
    """What a person should know of the prompts though the run can do without it."""
    of_backend = getattr(config.backend.config, "prompt_notes", None)
    judges, key = config.evaluation.rewards, "evaluation.rewards"
    found = targets.notes(config.rewards, training, "rewards")
    found += targets.notes(judges or config.rewards, evaluation, key if judges else "rewards")
    sets = {"prompts.source": training, "evaluation.source": evaluation}
    for key, prompts in sets.items():
        if prompts and of_backend is not None:
            found += of_backend(prompts, key)
    return found + _budget_notes(config, len(training))


def _budget_notes(config: RunConfig, available: int) -> list[str]:
    """Where a budget would have nothing to go by."""
    budget, size = config.prompts.budget, config.training
    drawn = size.num_steps * size.prompts_per_step
    if budget is None or drawn > available:
        return []
    return [
        f"prompts.budget: {budget.name!r} learns from earlier visits of a prompt, but this run "
        f"draws {drawn} of {available} prompts: where none comes twice, every group has group_size"
    ]


def refuse_unknown_tasks(specs: Sequence[RewardSpec], prompts: Sequence[Prompt], key: str) -> None:
    """``UserError`` for a reward of a task that no prompt has."""
    known = sorted({prompt.task for prompt in prompts} - {""})
    for i, spec in enumerate(specs):
        for task in spec.tasks or ():
            if task not in known:
                hint = nearest(task, known) if known else f"they have no column {TASK!r}"
                raise UserError(f"{key}[{i}].tasks: no prompt has the task {task!r}; {hint}")


def describe(config: RunConfig) -> list[tuple[str, str]]:
    """Derived counts of a run, as (what, value) lines; loads no weights."""
    refuse_unless_consistent(config)
    training, evaluation = load_prompt_sets(config)
    size = config.training
    samples = size.prompts_per_step * size.group_size
    updates = size.num_epochs * size.updates_per_epoch
    stale = size.stale
    again = 0 if stale is None else stale.groups * size.group_size
    per_update = -(-(samples + again) // size.updates_per_epoch)
    judged = len(evaluation) * config.evaluation.samples_per_prompt
    least, most = group_sizes(config)
    each = f"{size.group_size}" if least == most else f"{size.group_size} ({least} to {most})"
    backend = backend_module(config.backend.name, "backend")
    rewards = ", ".join(f"{spec.weight:g} x {spec.label}" for spec in config.rewards)
    if config.kl_in_reward is not None:
        rewards += f", less {config.kl_in_reward.coef:g} x {config.kl_in_reward.estimator}"
    section = config.backend.config
    shape = micro_batch_shape(section.num_decisions, size.micro_batch_size)  # type: ignore[attr-defined]
    batches = -(-per_update // shape.samples) * len(shape.decisions)
    held = min(size.micro_batch_size, shape.samples * (section.num_decisions or 1))  # type: ignore[attr-defined]
    unit = "samples" if section.num_decisions is None else "decisions"  # type: ignore[attr-defined]
    memory = _memory(backend.estimate_memory(section), held)
    return [
        ("run folder", str(config.run_dir)),
        ("prompts", f"{len(training)} for training, {len(evaluation)} held out"),
        *(("note", note) for note in prompt_notes(config, training, evaluation)),
        (
            "samples per step",
            f"{samples} = {size.prompts_per_step} prompts x {each}",
        ),
        *([("stale samples", f"{again} more, of the last {stale.steps} steps")] if stale else []),
        ("micro-batches", f"{batches} per optimizer step, of at most {held} {unit}"),
        ("optimizer steps", f"{size.num_steps * updates} = {size.num_steps} steps x {updates}"),
        ("samples in all", str(samples * size.num_steps)),
        ("evaluation", f"{judged} samples every {config.evaluation.every} steps"),
        ("rewards", rewards or "none"),
        ("objective", _pipeline(config)),
        *(_key_value(line) for line in backend.describe(config.backend.config)),
        *((f"memory: {name}", human_bytes(value)) for name, value in memory.items()),
        ("memory: at most", human_bytes(sum(memory.values()))),
    ]


def _memory(estimate: dict[str, float], micro_batch_size: int) -> dict[str, float]:
    """Bytes by use; what is counted for one decision is held for a whole micro-batch."""
    found = {}
    for name, value in estimate.items():
        per_decision = name.endswith("_per_decision")
        label = name.removesuffix("_per_decision").replace("_", " ")
        found[label] = value * (micro_batch_size if per_decision else 1)
    return found


def _key_value(line: str) -> tuple[str, str]:
    key, _, value = line.partition(": ")
    return key, value


def human_bytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.1f} {unit}"


def refuse_foreign_folder(run: Path, resume: bool) -> None:
    """``UserError`` if the run folder holds something that starting afresh would destroy."""
    if run.exists() and not run.is_dir():
        raise UserError(f"output_dir: {run} is a file")
    ours = (run / "config.yaml").is_file()
    if not run.is_dir() or not any(run.iterdir()) or (resume and ours):
        return
    if resume:
        raise UserError(f"output_dir: {run} holds no run to resume, but other files")
    what = "another run" if ours else "other files"
    raise UserError(
        f"output_dir: {run} holds {what}; continue it with --resume, or choose a new folder with "
        f"output_dir=... or name=..."
    )


def _pipeline(config: RunConfig) -> str:
    correction = [config.correction] if config.correction is not None else []
    losses = [config.objective, *correction, *config.regularisers]
    parts = [config.advantage, *config.modulators, *config.selection, *losses]
    return " -> ".join(part.name for part in parts)
