"""Log-probabilities of completions under a network of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmrl.errors import UserError
from mmrl.text.attention import prepare
from mmrl.text.config import Config
from mmrl.text.head import Head, Scored, score
from mmrl.text.layout import Encoded, Layout, Row, for_network, joined, lay_out
from mmrl.types import DTYPES

How = Literal["shared_prompt", "packed", "padded"]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def score_rows(
    network: Any,
    rows: Sequence[Row],
    width: int,
    *,
    how: How,
    temperature: float,
    chunk: int,
    with_entropy: bool,
    entropy_slope: bool = True,
    second_temperature: float | None = None,
    with_sum_squares: bool = False,
    attention: str = "sdpa",
) -> Scored:
    """What ``mmrl.text.head.score`` finds, [B, K = ``width``], 0 where a sample has no such token.

    Without ``entropy_slope`` the entropy has no gradient.  ``attention``: one of
    ``mmrl.text.kernels``; padded rows attend by transformers' own sdpa.
    """
    layout = lay_out(rows, share_prompts=how == "shared_prompt").to(device_of(network))
    if how == "padded":
        states = padded_states(network, rows)
    else:
        states = packed_states(network, layout, attention)[layout.before]
    found = score(
        _head_of(network),
        states,
        layout.targets,
        temperature=temperature,
        chunk=chunk,
        with_entropy=with_entropy,
        entropy_slope=entropy_slope,
        second_temperature=second_temperature,
        with_sum_squares=with_sum_squares,
    )
    shape = (len(rows), width)
    others = (None if x is None else layout.unpack(x, shape) for x in found[1:])
    return Scored(layout.unpack(found.logp, shape), *others)


def packed_states(network: Any, layout: Layout, attention: str) -> Tensor:
    """Hidden states [L, D] of a row of trees, by a kernel of ``mmrl.text.kernels``."""
    # A mask of four dimensions is taken as it is; the kernel has the layout instead.
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.tokens.device)
    out = network.base_model(
        input_ids=layout.tokens,
        position_ids=for_network(layout.positions),
        attention_mask=unused,
        use_cache=False,
        row_attention=prepare(attention, layout),
        **layout.inputs,
    )
    return out.last_hidden_state[0]


def padded_states(network: Any, rows: Sequence[Row]) -> Tensor:
    """Hidden states [M, D] that predict the tokens of all completions, a padded row for each."""
    device = device_of(network)
    texts = [torch.tensor([*row.prompt.ids, *row.completion]) for row in rows]
    places = [row.prompt.positions_with(len(row.completion)).T for row in rows]
    tokens, seen, positions = (
        nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)
        for parts in (texts, [torch.ones_like(text) for text in texts], places)
    )
    inputs = joined([row.prompt for row in rows])
    out = network.base_model(
        input_ids=tokens,
        attention_mask=seen,
        position_ids=for_network(positions.permute(2, 0, 1)),
        use_cache=False,
        **{name: value.to(device) for name, value in inputs.items()},
    ).last_hidden_state
    parts = [
        states[len(row.prompt.ids) - 1 : len(text) - 1]
        for row, text, states in zip(rows, texts, out, strict=True)
    ]
    return torch.cat(parts)


def refuse_wrong_scores(network: Any, config: Config, prompt: Encoded, attention: str) -> None:
    """``UserError`` if tokens after a prompt score otherwise than by the network's own logits.

    Some architectures do more between hidden states and logits, or attend in ways of their own.
    """
    last = prompt.ids[-1]  # a token of text, which not all are
    probe = [Row(prompt=prompt, completion=[last] * length) for length in (2, 3)]
    try:
        with torch.no_grad():
            found = score_rows(
                network,
                probe,
                3,
                how=config.update,
                temperature=1.0,
                chunk=2,
                with_entropy=False,
                attention=attention,
            ).logp
            gap = max(
                float((found[i, : len(row.completion)] - own_logp(network, row)).abs().max())
                for i, row in enumerate(probe)
            )
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(_refusal(network, config, str(error))) from error
    if not gap <= TOLERANCE[DTYPES[config.model.dtype]]:
        raise UserError(_refusal(network, config, f"log-probabilities differ by {gap:.2g}"))


def own_logp(network: Any, row: Row) -> Tensor:
    """[K] log-probabilities of a completion by the network's own forward."""
    device, length = device_of(network), len(row.completion)
    logits = network(
        input_ids=torch.tensor([[*row.prompt.ids, *row.completion]], device=device),
        position_ids=for_network(row.prompt.positions_with(length)[:, None].to(device)),
        use_cache=False,
        **{name: value.to(device) for name, value in row.prompt.inputs.items()},
    ).logits
    logp = logits[0, len(row.prompt.ids) - 1 : -1].float().log_softmax(-1)
    return logp.gather(1, torch.tensor(row.completion).to(logp.device)[:, None])[:, 0]


def device_of(network: Any) -> torch.device:
    """Where the parameters are."""
    return next(network.parameters()).device


def _refusal(network: Any, config: Config, reason: str) -> str:
    other = "" if config.update == "padded" else "; try backend.update = 'padded'"
    return (
        f"backend.update = {config.update!r} does not score {type(network).__name__} as the model "
        f"itself does: {reason}{other}"
    )


def _head_of(network: Any) -> Head:
    head = network.get_output_embeddings()
    cap = getattr(network.config, "final_logit_softcapping", None)
    return head if cap is None else lambda hidden: cap * torch.tanh(head(hidden) / cap)
