"""The loop that every backend shares: roll out, score, estimate, update.

Nothing here knows what a sample is.  Every mean has a global denominator that is known before the
first backward, so results depend neither on the micro-batch size nor on the number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator

from mmrl import facts, kl_in_reward, per_decision, reduction, selecting
from mmrl.backend import Backend
from mmrl.checkpoint import Progress
from mmrl.config import Part, RunConfig
from mmrl.distributed import (
    any_process,
    gather_items,
    sum_over_processes,
)
from mmrl.errors import UserError
from mmrl.loss_parts import (
    Signals,
    coupled,
    initial_states,
    loss_parts,
    sample_sums,
    step_signals,
    survey_of,
    updated_states,
    view,
)
from mmrl.metrics import Means
from mmrl.modulation import modulated, taught
from mmrl.needs import asks_survey
from mmrl.preflight import micro_batch_shape
from mmrl.replay import Anchors, Replay
from mmrl.replay_gaps import Gaps
from mmrl.rollouts import (
    Batch,
    Trainable,
    allocate,
    assemble,
    collect_scores,
    due_refresh,
    has_hung,
    is_varied,
    learn,
    make_requests,
    roll_out,
    size_metrics,
    state_metrics,
    summary,
    trainable_groups,
    why_unscored,
    with_facts,
)
from mmrl.stale import Stale, Update, spread
from mmrl.types import (
    Advantages,
    LossTerms,
    Moment,
    PolicyTerms,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    Scores,
    UpdateBatch,
)
from mmrl.windows import MicroBatch, Window, plan_windows
from rewards.combine import GroupScores, Scorer

REFRESH_STREAM = -2
"""Noise of samples that only score prompts, before step 0; those before step n have n less.  The
evaluation has -1."""


@dataclass(frozen=True)
class Given:
    """What the loss of a window has beside its rows.

    ``ahead``: the only micro-batch of the window and what the policy says of it, where known.
    """

    advantages: Advantages
    anchors: Anchors
    signals: Signals
    ahead: tuple[PolicyTerms, UpdateBatch] | None = None


NUM_TOKENS = "num_tokens"
"""Prompt and completion tokens of all samples, where samples have tokens."""


@dataclass
class Trainer:
    """One run in progress. ``progress`` and ``stale`` change; everything else is fixed at start.

    ``observe`` is shown what each step rolled out to train on, on every process.  ``stale``: groups
    of earlier steps, where these are trained again.
    """

    config: RunConfig
    accelerator: Accelerator
    backend: Backend
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    prompts: Sequence[Prompt]
    scorer: Scorer
    progress: Progress = field(default_factory=Progress)
    observe: Callable[[Trainable, Advantages], None] | None = None
    unscored_in_a_row: int = 0
    replay_gap: Gaps | None = None
    stale: Stale | None = None

    @property
    def _replay(self) -> Replay:
        return Replay(config=self.config, accelerator=self.accelerator, backend=self.backend)

    def step(self) -> dict[str, float]:
        """One rollout and its updates; returns what to log."""
        started, cpu_started = time.perf_counter(), time.process_time()
        means = Means()
        refreshed = self._refresh(means)
        requests = self._requests()
        rolled, times = self._collect(requests, means)
        earned = self._scores(rolled)
        scores = self._penalised(rolled, earned, means)
        advantages = self._selected(scores, self._advantages(scores, rolled.scores))
        if self.observe is not None:
            self.observe(rolled, advantages)
        rate = float(self.scheduler.get_last_lr()[0])
        _, update_time = _timed(lambda: self._update(rolled, earned, advantages, means))
        step = self.progress.step
        self.backend.after_update(self.progress.updates)
        logged = self._reduced(means)
        states = taught(self.config.modulators, logged, self.progress.modulators)
        cpu_time = sum_over_processes(self.accelerator, [time.process_time() - cpu_started])
        self.progress = replace(self.progress, step=step + 1, modulators=states)
        return {
            **summary(assemble(rolled.everything), rolled.everything),
            **self._drawn(requests),
            **refreshed,
            **advantages.metrics,
            **logged,
            "learning_rate": rate,
            "bad_updates": float(self.progress.bad_updates),
            **times,
            "time/update": update_time,
            "step_time": time.perf_counter() - started,
            "time/cpu": cpu_time[0],
        }

    def _roll_out(self, requests: Sequence[RolloutRequest], means: Means) -> list[RolloutGroup]:
        return roll_out(self.backend, self.accelerator, self.scorer, requests, means)

    def _collect(
        self, requests: Sequence[RolloutRequest], means: Means
    ) -> tuple[Trainable, dict[str, float]]:
        """Groups to train on, and what they took: as many as a step has, if need be from more.

        ``requests``: those of the step, then those that may take the place of groups without a
        signal.
        """
        size, refills = self.config.training.prompts_per_step, self.config.training.refills
        batches: list[Batch] = []
        spent, start = {"time/rollout": 0.0, "time/reward": 0.0}, 0
        for _ in range(1 + refills):
            found = sum(is_varied(scores) for batch in batches for scores in batch.scores)
            if found == size:
                break
            asked = requests[start : start + size - found]
            start += len(asked)
            groups, seconds = _timed(lambda: self._roll_out(asked, means))  # noqa: B023
            spent["time/rollout"] += seconds
            scores, seconds = _timed(lambda: collect_scores(self.accelerator, self.scorer))
            spent["time/reward"] += seconds
            self._learn(groups, scores, asked)
            batches.append(Batch(groups=groups, scores=scores))
        world = self.accelerator.num_processes
        rolled = trainable_groups(batches, world, drop=refills > 0)
        if refills:
            spent["sampling/groups"] = float(start)
            spent["sampling/groups_trained"] = float(len(rolled.scores))
        return rolled, spent

    def _refresh(self, means: Means) -> dict[str, float]:
        """Samples of every prompt, where the sampler wants them to score it; what they cost.

        Of what they report only the tokens count towards the step.
        """
        sampler, step = self.config.prompts.sampler, self.progress.step
        count = due_refresh(sampler, step)
        if not count:
            return {}
        started, size = time.perf_counter(), self.config.training.prompts_per_step
        spent = Means()
        for first in range(0, len(self.prompts), size):
            chosen = self.prompts[first : first + size]
            requests = make_requests(
                chosen, count, self.config.seed, REFRESH_STREAM - step, self.moment
            )
            groups = self._roll_out(requests, spent)
            self._learn(groups, collect_scores(self.accelerator, self.scorer), requests)
        means.add({name: value for name, value in spent.metrics.items() if name == NUM_TOKENS})
        return {
            "sampler/refresh_samples": float(count * len(self.prompts)),
            "time/refresh": time.perf_counter() - started,
        }

    def _drawn(self, requests: Sequence[RolloutRequest]) -> dict[str, float]:
        """What is logged of how the prompts of a step were chosen."""
        prompts, progress = self.config.prompts, self.progress
        sizes = {} if prompts.budget is None else size_metrics(requests)
        found = state_metrics(prompts.sampler, progress.sampler)
        return found | state_metrics(prompts.budget, progress.budget) | sizes

    def _learn(
        self,
        groups: Sequence[RolloutGroup],
        collected: Sequence[GroupScores],
        requests: Sequence[RolloutRequest],
    ) -> None:
        prompts, rolled = self.config.prompts, (self.accelerator, groups, collected, requests)
        sampler = learn(prompts.sampler, self.progress.sampler, *rolled)
        budget = self.progress.budget
        if prompts.budget is not None:
            budget = learn(prompts.budget, budget, *rolled)
        self.progress = replace(self.progress, sampler=sampler, budget=budget)

    def _refuse_unscored(self, scores: Scores, collected: Sequence[GroupScores]) -> None:
        """``UserError`` if nothing has a usable reward, at once or step after step.

        A reward that never worked is a mistake; one that hangs, or stops working for a while, costs
        the steps it misses, which are logged as skipped.
        """
        self.unscored_in_a_row += 1
        worked = self.progress.updates > 0
        if (worked or has_hung(collected)) and (
            self.unscored_in_a_row < self.config.training.max_unscored_steps
        ):
            return
        raise UserError(why_unscored(scores, collected))

    def _requests(self) -> list[RolloutRequest]:
        training, sampler = self.config.training, self.config.prompts.sampler
        step, seed = self.progress.step, self.config.seed
        chosen, state = sampler.module.take(
            self.prompts,
            training.prompts_per_step * (1 + training.refills),
            step,
            seed,
            sampler.config,
            self.progress.sampler,
        )
        budget = self.config.prompts.budget
        chosen, sizes = allocate(budget, chosen, training.group_size, self.progress.budget)
        self.progress = replace(self.progress, sampler=state)
        return make_requests(chosen, sizes, seed, step, self.moment)

    def _scores(self, rolled: Trainable) -> Scores:
        names, scores = facts.read_by(self.config), assemble(rolled.scores)
        scores = with_facts(scores, self.accelerator, rolled, names, self.config.rewards)
        if facts.SCORE_NORM not in names:
            return scores

        def norm(terms: PolicyTerms, rows: MicroBatch) -> torch.Tensor:
            return facts.score_norm(terms, rows.drawn)

        norms = self._summed(rolled, scores, facts.SCORE_NORM_NEEDS, norm)
        return replace(scores, score_norm=norms)

    def _penalised(self, rolled: Trainable, scores: Scores, means: Means) -> Scores:
        """``scores``, less the divergence from the reference where the run has it in the reward."""
        section = self.config.kl_in_reward
        if section is None:
            return scores

        def divergence(terms: PolicyTerms, rows: MicroBatch) -> torch.Tensor:
            kl = kl_in_reward.divergence(terms, rows.drawn, section)
            means.add(reduction.tallies({"kl_in_reward": kl}, rows.drawn, rows.weights))
            return kl

        kl = self._summed(rolled, scores, kl_in_reward.NEEDS, divergence)
        return kl_in_reward.penalised(scores, kl, section)

    def _summed(
        self,
        rolled: Trainable,
        scores: Scores,
        needs: frozenset[str],
        value: Callable[[PolicyTerms, MicroBatch], torch.Tensor],
    ) -> torch.Tensor:
        """[N] float64, over processes: sums of a ``value`` [B, K] by the policy that sampled."""
        total = torch.zeros_like(scores.combined)
        windows = self._windows(rolled, scores, range(len(total)), 1)
        for rows, terms in self._replay.asked(windows, needs):
            places = torch.tensor([sample.position for sample in rows.samples])
            total.index_add_(0, places, value(terms, rows).sum(1) * rows.weights)
        return total.new_tensor(sum_over_processes(self.accelerator, total.tolist()))

    def _advantages(self, scores: Scores, collected: Sequence[GroupScores]) -> Advantages:
        part = self.config.advantage
        result, state = part.module.estimate(scores, part.config, self.progress.advantage)
        self.progress = replace(self.progress, advantage=state)
        if bool(result.keep.any()):
            self.unscored_in_a_row = 0
        else:
            self._refuse_unscored(scores, collected)
        return modulated(self.config.modulators, result, scores, self.progress.modulators)

    @property
    def moment(self) -> Moment:
        """The step that comes next, or is being made."""
        config = self.config
        steps = config.training.num_steps
        return Moment(step=self.progress.step, num_steps=steps, seed=config.seed)

    def _selected(self, scores: Scores, advantages: Advantages) -> Advantages:
        for part in self.config.selection:
            advantages = part.module.select(advantages, scores, self.moment, part.config)
        return advantages

    def _kept(
        self, rolled: Trainable, scores: Scores, advantages: Advantages, means: Means
    ) -> selecting.Kept:
        """Of this process's samples, the decisions that are trained, where not all of them are."""
        kept: selecting.Kept = {}
        for part in self.config.selection:
            share = selecting.decision_share(part, self.moment)
            if share < 1:
                order = advantages.keep.nonzero()[:, 0].tolist()
                windows = self._windows(rolled, scores, order, 1)
                asked = self._replay.asked(windows, part.module.needs(part.config))
                keys = selecting.keys_of(part, asked, advantages.values)
                kept = selecting.largest(self.accelerator, keys, kept, share)
                means.add(selecting.metrics(keys, kept))
        return kept

    def _update(
        self, rolled: Trainable, scores: Scores, advantages: Advantages, means: Means
    ) -> None:
        if not bool(advantages.keep.any()):
            means.add({"skipped_steps": (1.0, 1.0)})
            return
        training, replay = self.config.training, self._replay
        signals = step_signals(loss_parts(self.config), scores, advantages)
        kept = self._kept(rolled, scores, advantages, means)
        fresh = Update(rolled, scores, advantages, signals)
        if self.stale is not None:
            rolled, scores, advantages, signals = self.stale.joined(
                fresh, self.progress.step, means
            )
        epochs = range(training.num_epochs)
        plans = [self._plan(rolled, scores, advantages, epoch, kept) for epoch in epochs]
        if self.replay_gap is None:
            self.replay_gap = replay.gaps(plans[0])
        known = replay.anchors(plans, rolled.groups[0], advantages.tempering)
        for windows, anchors in zip(plans, known, strict=True):
            given = Given(advantages, anchors, signals)
            for window in windows:
                self._update_window(window, self._coupled(window, scores, given), means)
        if self.stale is not None:
            self.stale.add(fresh, self.progress.step, known[0])

    def _coupled(self, window: Window, scores: Scores, given: Given) -> Given:
        """``given``, with signals that depend on all samples of the optimizer step together."""
        parts = loss_parts(self.config)
        asked = frozenset[str]().union(*map(asks_survey, parts.values()))
        if not asked:
            return given
        # Strictly on-policy the ratio is 1: nothing has to be evaluated to know that.
        names = sorted(asked if self._replay.off_policy else asked - {"old"})
        needs = frozenset({"logp", "logp_ref"} if "reference" in names else {"logp"})
        ahead, only = None, len(window.micro_batches) == 1

        def evaluate(rows: MicroBatch) -> tuple[PolicyTerms, UpdateBatch]:
            nonlocal ahead
            batch = self._collated(rows, given)
            terms = self.backend.evaluate(batch, self._replay.needs(batch) if only else needs)
            ahead = (terms, batch) if only else None
            return terms, batch

        # A window of one micro-batch needs no second forward: its loss goes on from this one.
        with torch.set_grad_enabled(only):
            sums = sample_sums(window, names, evaluate, len(scores.combined))
        everywhere = sum_over_processes(self.accelerator, sums.flatten().tolist())
        sums = sums.new_tensor(everywhere).view_as(sums)
        survey, places = survey_of(sums, names, asked, scores.group)
        signals = coupled(parts, given.signals, survey, places, len(scores.combined))
        return replace(given, signals=signals, ahead=ahead)

    def _collated(self, rows: MicroBatch, given: Given) -> UpdateBatch:
        progress = self.moment.progress
        return self._replay.collate(rows, given.advantages, given.anchors, progress=progress)

    def _plan(
        self,
        rolled: Trainable,
        scores: Scores,
        advantages: Advantages,
        epoch: int,
        kept: selecting.Kept,
    ) -> list[Window]:
        training = self.config.training
        order = torch.arange(len(scores.combined))
        if training.updates_per_epoch > 1:
            key = repr((self.config.seed, self.progress.step, epoch)).encode()
            seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        order = [i for i in order.tolist() if bool(advantages.keep[i])]
        parts = {"counts": advantages.counts, "kept": kept}
        return self._windows(rolled, scores, order, training.updates_per_epoch, **parts)

    def _windows(
        self, rolled: Trainable, scores: Scores, order: Sequence[int], count: int, **parts: Any
    ) -> list[Window]:
        decisions = self.config.backend.config.num_decisions  # type: ignore[attr-defined]
        return plan_windows(
            rolled.groups,
            rolled.owners,
            scores.group,
            order,
            num_windows=count,
            shape=micro_batch_shape(decisions, self.config.training.micro_batch_size),
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            whole_groups=getattr(self.config.objective.module, "WHOLE_GROUPS", False),
            **parts,
        )

    def _update_window(self, window: Window, given: Given, means: Means) -> None:
        denominator = self._denominator(window)
        last = len(window.micro_batches) - 1
        own = {key: Means() for key in self._states}
        for i, rows in enumerate(window.micro_batches):
            with self._synchronising(i == last):
                loss = self._loss(rows, denominator, given, own, means)
                # DDP averages over processes; the denominator already counts them all.
                self.accelerator.backward(loss * self.accelerator.num_processes)
        if self._optimizer_step(means) and own:
            logged = {key: self._merged(found) for key, found in own.items()}
            states = updated_states(loss_parts(self.config), self._states, logged)
            self.progress = replace(self.progress, losses=states)

    @property
    def _states(self) -> dict[str, dict[str, Any]]:
        """What the objective and the regularisers keep between optimizer steps."""
        return initial_states(loss_parts(self.config), self.progress.losses)

    def _denominator(self, window: Window) -> float:
        training, local = self.config.training, 0.0
        for rows in window.micro_batches:
            if rows.decisions.start == 0:  # a sample counts once, however often it is met
                local += reduction.denominator(
                    rows.whole_mask,
                    rows.weights,
                    training.aggregation,
                    count_empty=training.count_empty,
                )
        return reduction.step_denominator(sum_over_processes(self.accelerator, [local])[0])

    @contextlib.contextmanager
    def _synchronising(self, last: bool) -> Iterator[None]:
        """Gradients travel between processes only with the last micro-batch of a window."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        model = self.backend.model
        context = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
        with context:
            yield

    def _loss(
        self,
        rows: MicroBatch,
        denominator: float,
        given: Given,
        own: Mapping[str, Means],
        means: Means,
    ) -> torch.Tensor:
        training = self.config.training
        if given.ahead is not None:
            terms, batch = given.ahead
        else:
            batch = self._collated(rows, given)
            terms = self.backend.evaluate(batch, self._replay.needs(batch))
        whole = reduction.decision_weights(
            rows.whole_mask, rows.weights, training.aggregation, training.horizon
        )
        coefficients = whole[:, rows.decisions].to(batch.weights)
        places, states = [sample.position for sample in rows.samples], self._states
        means.add(terms.metrics)
        if self.stale is not None:
            means.add(spread(terms, batch, rows))
        if any(hasattr(part.module, "learn") for part in self.config.modulators):
            means.add(reduction.tallies({"surprise": -terms.logp}, batch.mask, batch.weights))
        total = batch.weights.new_zeros(())
        for key, part in loss_parts(self.config).items():
            own_batch = view(batch, key, places, given.signals, states)
            found = self._part_loss(key, part, terms, own_batch)
            means.add(found.metrics)
            if key in own:
                own[key].add(found.metrics)
            coef: float = 1.0 if key == "objective" else part.config.coef  # type: ignore[attr-defined]
            total = total + coef * reduction.weighted_sum(found.loss, coefficients) / denominator
        # A sum of shares of one global mean: `loss` is that mean, whatever the micro-batches.
        means.add({"loss": (float(total.detach()), 0.0)})
        return total

    def _part_loss(self, key: str, part: Part, terms: PolicyTerms, batch: UpdateBatch) -> LossTerms:
        """Of the objective, corrected, or of a regulariser."""
        if key != "objective":
            return part.module.loss(terms, batch, part.config)
        found, correction = (
            per_decision.loss(part.module, terms, batch, part.config),
            self.config.correction,
        )
        if correction is None:
            return found
        return correction.module.correct(found, terms, batch, correction.config)

    def _optimizer_step(self, means: Means) -> bool:
        """Whether it was made: not with gradients that are not finite."""
        # DeepSpeed has clipped, and stepped if the norm was finite, inside the last backward; then
        # accelerate only answers with that norm, and its optimizer's methods do nothing.
        parameters = [p for p in self.backend.model.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm)
        # `loss` counts once for each optimizer step, on the main process alone.
        main = float(self.accelerator.is_main_process)
        means.add({"loss": (0.0, main)})
        finite = norm is None or bool(torch.isfinite(torch.as_tensor(norm)))
        if any_process(self.accelerator, not finite):
            self._skip_update()
            return False
        if norm is not None:
            means.add({"grad_norm": (float(norm) * main, main)})
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress = replace(self.progress, updates=self.progress.updates + 1, bad_in_a_row=0)
        return True

    def _skip_update(self) -> None:
        progress, scaler = self.progress, self.accelerator.scaler
        searching = scaler is not None and scaler.get_scale() > 1.0
        if scaler is not None:
            # fp16: the scale falls for the next update.  Overflows on the way are no divergence.
            scaler.update()
        self.optimizer.zero_grad()
        streak = progress.bad_in_a_row + (0 if searching else 1)
        self.progress = replace(progress, bad_updates=progress.bad_updates + 1, bad_in_a_row=streak)
        self._refuse_divergence()

    def _refuse_divergence(self) -> None:
        limit, streak = self.config.training.max_bad_updates, self.progress.bad_in_a_row
        if streak >= limit:
            raise UserError(
                f"gradients were not finite in {streak} updates in a row "
                f"(training.max_bad_updates: {limit}); lower optimizer.learning_rate or use "
                "a wider dtype, in a new run (name=...)"
            )

    def _reduced(self, means: Means) -> dict[str, float]:
        return self._counted(self._merged(means))

    def _merged(self, means: Means) -> dict[str, float]:
        """Means and totals over all processes."""
        merged = Means()
        for metrics in gather_items(self.accelerator, [means.metrics]):
            merged.add(metrics)
        return merged.result()

    def _counted(self, values: dict[str, float]) -> dict[str, float]:
        """``num_tokens`` as TRL has it: all that the run has seen."""
        if NUM_TOKENS not in values:
            return values
        seen = self.progress.num_tokens + int(values[NUM_TOKENS])
        self.progress = replace(self.progress, num_tokens=seen)
        return values | {NUM_TOKENS: float(seen)}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started
