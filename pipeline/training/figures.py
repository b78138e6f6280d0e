"""What is logged of a phase's responses before its updates: one exchange between ranks for all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.training.advantages import kl_k3
from pipeline.training.decode import Response
from pipeline.training.ranks import Ranks
from pipeline.training.spread import NUMBERS, Spread, merged, part_of


def phase_figures(
    responses: Sequence[Response],
    logprobs: Tensor,
    reference: Tensor,
    entropy: Tensor,
    values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    ranks: Ranks,
) -> tuple[dict[str, float], Spread]:
    """Metrics over all ranks from this rank's packed tensors (N,), and the advantages' spread.

    KL(policy || reference) is k3's: nats per response, and per token. Explained variance is 1 - Var(R - V) / Var(R),
    0 where the returns do not vary.
    """
    spreads = torch.cat([part_of(each) for each in (advantages, returns, values, returns - values)])
    sums = torch.stack([kl_k3(logprobs, reference).double().sum(), entropy.double().sum()])
    counts = [
        len(responses),
        sum(len(response.prompt) for response in responses),
        sum(response.finish == "eos" for response in responses),
        sum(response.finish == "stop" for response in responses),
    ]
    parts = ranks.gather_rows(torch.cat([spreads, sums, sums.new_tensor(counts)])).cpu()  # (world, n)
    of_advantages, of_returns, of_values, of_errors = (
        merged(parts[:, start : start + NUMBERS].tolist()) for start in range(0, 4 * NUMBERS, NUMBERS)
    )
    kl, nats, rows, prompt, eos, stopped = parts[:, 4 * NUMBERS :].sum(dim=0).tolist()
    tokens = of_values.count
    known = of_returns.variance > 1e-12
    figures = {
        "policy/kl": kl / rows,
        "policy/kl_per_token": kl / tokens,
        "policy/sqrt_kl": max(kl / rows, 0.0) ** 0.5,
        "policy/entropy": nats / tokens,
        "tokens/prompt": int(prompt),
        "tokens/response": int(tokens),
        "response_length/mean": tokens / rows,
        "finished/eos": eos / rows,
        "finished/stop": stopped / rows,
        "finished/length": 1.0 - (eos + stopped) / rows,
        "values/explained_variance": 1.0 - of_errors.variance / of_returns.variance if known else 0.0,
        **of_values.row("old_values"),
        **of_returns.row("returns"),
        **of_advantages.row("advantages"),
    }
    return figures, of_advantages
