"""The diagonal of the Fisher information, per token: how much each weight matters for what a model says.

    F_i = 1/N · Σ_e (∂/∂θ_i Σ_t log p(y_t | x_e))²

over examples e with N targets t in all. The labels y are drawn from the model itself (the true Fisher) or are those of
the data (the empirical one). Divided by tokens and not by examples, F is the curvature of the mean loss a token,
whatever the length of an example, so that a penalty ``λ/2 ΣF(θ-θ*)²`` with λ = 1 weighs the past as the present.

Sources: Kirkpatrick et al. 2017 (arXiv 1612.00796); true and empirical: Kunstner et al. 2019 (arXiv 1905.12558).
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LLMBuilderError
from ..nn.heads import IGNORED, LanguageHead
from ..ops import ewc_accumulate_
from .per_example import SquaredGradients

Tensors = Mapping[str, Tensor]


class Scores(NamedTuple):
    """What a model says of a batch.

    Attributes:
        logits: [n, V], one row for each target, examples in their order.
        targets: [n] int64, the data's labels.
        owners: [n] int64, the example (row of the batch's tensors) of each target.
    """

    logits: Tensor
    targets: Tensor
    owners: Tensor


Score = Callable[[Tensors], Scores]


def diagonal_fisher(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    batches: Iterable[Tensors],
    score: Score,
    *,
    empirical: bool = False,
    seed: int = 0,
    head: nn.Module | None = None,
    probe: Tensors | None = None,
) -> dict[str, Tensor]:
    """F of each parameter, by name; the model is run as it is and left as it was.

    One backward pass a batch (see ``per_example.py``). Parameters that are used in ways which its hooks do not see are
    done one example at a time; so are those whose F of the probe's examples does not agree with that.

    Args:
        model: in evaluation mode.
        params: those of its parameters that F is wanted of.
        batches: tensors whose dimension 0 counts examples.
        score: runs the model on a batch.
        empirical: labels of the data instead of the model's own.
        seed: of the labels that are drawn.
        head: as for ``SquaredGradients``.
        probe: a small batch, like the others. None: the first two examples.

    Returns:
        By name, like each parameter in shape, fp32 (fp64 where the parameter is); 0 where there are no targets. The
        same call gives the same bits.

    Raises:
        LLMBuilderError: a logit is not finite.
    """
    sums = {name: _zeros(param) for name, param in params.items()}
    generator = torch.Generator(next(iter(params.values())).device).manual_seed(seed)
    squares = SquaredGradients(model, params, head)
    tokens, singly = 0, None
    for batch in batches:
        if singly is None:
            singly = _disagreeing(squares, probe or _part(batch, 0, 2), score)
        labels, missed = _add_batch(squares, sums, batch, score, None if empirical else generator, singly)
        _add_singly(squares, {name: sums[name] for name in missed}, batch, score, labels)
        tokens += len(labels)
    for total in sums.values():
        total /= max(tokens, 1)
    return sums


def language_scores(model: nn.Module) -> Score:
    """How ``diagonal_fisher`` runs a language model on a batch padded on the right: ``input_ids`` and ``labels``.

    Its mask is left out, for what is causal does not see what comes behind, and attention is quicker without. Positions
    go with it where the model takes them: those that it makes itself are one row for all examples.
    """
    language = LanguageHead(model)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def score(batch: Tensors) -> Scores:
        inputs = {name: batch[name] for name in ("input_ids", "labels")}
        if takes_positions:
            ids = batch["input_ids"]
            inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        logits, targets = language.target_logits(inputs)
        return Scores(logits, targets, (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0])

    return score


def _add_batch(
    squares: SquaredGradients,
    sums: Tensors,
    batch: Tensors,
    score: Score,
    generator: torch.Generator | None,
    singly: AbstractSet[str] = frozenset(),
) -> tuple[Tensor, set[str]]:
    """Add what one backward pass gives, all but ``singly``; returns the labels, and the names of what it did not."""
    size = len(next(iter(batch.values())))
    with squares.watching(size), torch.enable_grad():
        logits, targets, owners = score(batch)
        # One pass: what is not finite stays so in a sum, which half precision would overflow.
        if not logits.sum(dtype=torch.promote_types(logits.dtype, torch.float32)).isfinite():
            raise LLMBuilderError(
                "the model's logits are not finite, so it has no Fisher information: train it less hard"
            )
        labels, descent = _descent(logits, targets, generator)
        missed = squares.missed() | singly
        wanted = {name: total for name, total in sums.items() if name not in missed}
        if wanted and len(labels):
            with squares.adding(wanted, owners.bincount(minlength=size).tolist()):
                torch.autograd.backward([logits], [descent])
    return labels, missed


def _add_singly(squares: SquaredGradients, sums: Tensors, batch: Tensors, score: Score, labels: Tensor) -> None:
    """The same sums by one forward and backward pass an example; ``labels`` are those of the whole batch."""
    if not sums:
        return
    params = [squares.params[name] for name in sums]
    for row in range(len(next(iter(batch.values())))):
        with torch.enable_grad():
            logits, _, _ = score(_part(batch, row, row + 1))
            given, labels = labels[: len(logits)], labels[len(logits) :]
            if not len(given):
                continue
            _, descent = _descent(logits, given, None)
            found = torch.autograd.grad(logits, params, descent, allow_unused=True)
        used = [(total, grad) for total, grad in zip(sums.values(), found, strict=True) if grad is not None]
        ewc_accumulate_([total for total, _ in used], [grad.to(total.dtype).contiguous() for total, grad in used])


def _disagreeing(squares: SquaredGradients, batch: Tensors, score: Score) -> set[str]:
    """The parameters that one backward pass of a small batch does not give, or whose sums over it differ between the
    two ways by more than rounding."""
    quick = {name: _zeros(param) for name, param in squares.params.items()}
    slow = {name: torch.zeros_like(total) for name, total in quick.items()}
    labels, missed = _add_batch(squares, quick, batch, score, None)
    seen = [name for name in quick if name not in missed]
    _add_singly(squares, {name: slow[name] for name in seen}, batch, score, labels)

    def differ(name: str) -> bool:
        # Far above rounding in the dtype that the model computes in, far below what a mixed-up example does.
        dtype = torch.get_autocast_dtype(labels.device.type) if torch.is_autocast_enabled(labels.device.type) else None
        tolerance = float(torch.finfo(dtype or squares.params[name].dtype).eps) ** 0.5
        return float(quick[name].sub_(slow[name]).abs_().max()) > tolerance * float(slow[name].max())

    return missed | {name for name in seen if differ(name)}


@torch.no_grad()
def _descent(logits: Tensor, targets: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Labels, drawn from the model where there is a generator, and the gradient of -Σ log p(label) by the logits."""
    descent = torch.softmax(logits, -1)
    labels = targets if generator is None or not len(targets) else descent.multinomial(1, generator=generator)[:, 0]
    descent[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return labels, descent


def _part(batch: Tensors, start: int, end: int) -> dict[str, Tensor]:
    return {name: tensor[start:end] for name, tensor in batch.items()}


def _zeros(param: Tensor) -> Tensor:
    return torch.zeros(param.shape, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)
