"""Every operator in plain torch: what serves where nothing faster does, the oracle of the tests, and their baseline.

Any device, any floating dtype, fp64 included. Shapes: x, dX [M, K]; y, dY [M, N]; A [r, K]; B [N, r]; S, dS [M, r].
The mask is defined here, in csrc/include/llmbuilder/philox.h and in kernels/dropout.py: the same bits in all three.
"""

import torch
from torch import Tensor

ROUNDS = 7  # of Philox4x32: Crush-resistant from seven on (Salmon et al. 2011, SC '11, table 2)
_WORD = 0xFFFFFFFF


def dropout(x: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """x * keep * 65536/(65536 - threshold). What is dropped is 0, whatever it was."""
    if threshold == 0:
        return x.clone()
    return torch.where(keep_mask(x.shape, threshold, seed, stream), x * (65536 / (65536 - threshold)), 0)


def lora_shrink(x: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """S = drop(x) Aᵀ, in x's dtype."""
    return _dropped(x, threshold, seed, stream) @ A.t()


def lora_expand_(y: Tensor, S: Tensor, B: Tensor, scaling: float) -> None:
    """y += scaling · S Bᵀ, in place."""
    y.addmm_(S, B.t(), alpha=scaling)


def lora_expand(S: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """y = scaling · S Bᵀ + bias."""
    y = S.new_zeros(S.shape[0], B.shape[0]) if bias is None else bias.repeat(S.shape[0], 1)
    return y.addmm_(S, B.t(), alpha=scaling)


def lora_fused(x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y = x Wᵀ + bias + scaling · S Bᵀ."""
    return lora_expand(S, B, bias, scaling).addmm_(x, W.t())


def lora_grad_sb(dY: Tensor, S: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dS = scaling · dY B in dY's dtype, and dB = scaling · dYᵀ S in fp32 (fp64 for fp64)."""
    return (dY @ B).mul_(scaling), widen(dY.t() @ S).mul_(scaling)


def lora_grad_ax_(
    x: Tensor, dS: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int, dX: Tensor | None
) -> Tensor:
    """dA = dSᵀ drop(x) in fp32 (fp64 for fp64); dX, unless None, gets drop'(dS A) added in place."""
    if dX is not None:
        dX.add_(_dropped(dS @ A, threshold, seed, stream))
    return widen(dS.t() @ _dropped(x, threshold, seed, stream))


def lora_grad_ax(
    x: Tensor, dS: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int, need_x: bool
) -> tuple[Tensor, Tensor | None]:
    """dA = dSᵀ drop(x) in fp32 (fp64 for fp64), and dX = drop'(dS A) where x needs it."""
    dX = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
    return lora_grad_ax_(x, dS, A, threshold, seed, stream, dX), dX


def lora_fused_grad(dY: Tensor, W: Tensor, dS: Tensor, A: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """dX = dY W + drop'(dS A)."""
    return (dY @ W).add_(_dropped(dS @ A, threshold, seed, stream))


def ewc_penalty_(params: list[Tensor], anchors: list[Tensor], fishers: list[Tensor] | None, strength: float) -> Tensor:
    """Adds strength · F(θ - θ*) to each ``.grad``, and returns strength/2 Σ F(θ - θ*)²."""
    total = torch.zeros((), dtype=torch.float64, device=params[0].device if params else None)
    for i, (param, anchor) in enumerate(zip(params, anchors, strict=True)):
        drift = widen(param.detach()) - anchor
        pull = drift if fishers is None else drift * fishers[i]
        assert param.grad is not None
        param.grad.add_(pull, alpha=strength)
        total += (pull * drift).sum(dtype=torch.float64)
    return strength / 2 * total


def ewc_accumulate_(fishers: list[Tensor], grads: list[Tensor], weight: float) -> None:
    """F += weight · g², in place."""
    for fisher, grad in zip(fishers, grads, strict=True):
        fisher.addcmul_(grad, grad, value=weight)


def softmax_cross_entropy_(
    logits: Tensor, targets: Tensor, row_weights: Tensor | None, softcap: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses of softcap·tanh(logits/softcap) (0: no cap) and the first index of each row's largest logit.

    When asked, the logits [M, V] become the gradient of Σ row_weight·loss with respect to them, in place.
    """
    capped = widen(logits)
    if softcap:
        capped = softcap * torch.tanh(capped / softcap)
    log_p = capped.log_softmax(-1)
    at_target = targets[:, None]
    losses, predictions = -log_p.gather(1, at_target).squeeze(1), capped.argmax(-1)
    if need_grad:
        grad = log_p.exp()
        grad.scatter_add_(1, at_target, -torch.ones_like(losses)[:, None])
        if softcap:
            grad *= 1 - (capped / softcap) ** 2
        logits.copy_(grad if row_weights is None else grad * row_weights[:, None])
    return losses, predictions


def keep_mask(shape: torch.Size | tuple[int, ...], threshold: int, seed: Tensor, stream: int) -> Tensor:
    """keep[row, column], boolean on the seed's device; the row counts over all leading dimensions."""
    *lead, columns = shape if len(shape) else (1,)
    return keep_rows(0, torch.Size(lead).numel(), columns, threshold, seed, stream).reshape(shape)


def keep_rows(first: int, rows: int, columns: int, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """The mask's rows from ``first`` on. A Philox call decides eight columns, by its eight 16-bit slices in order."""
    calls = (columns + 7) // 8
    row = torch.arange(first, first + rows, device=seed.device)[:, None].expand(-1, calls)
    call = torch.arange(calls, device=seed.device).expand(rows, -1)
    words = philox((call, row, torch.full_like(row, stream), torch.zeros_like(row)), seed)
    slices = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(1)[:, :columns]
    return slices >= threshold


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Philox4x32 of int64 tensors of 32-bit words under a 64-bit key: four words in a new last dimension."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        (high0, low0), (high1, low1) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return torch.stack([c0, c1, c2, c3], -1)


def widen(x: Tensor) -> Tensor:
    """x in the dtype of sums: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dropped(x: Tensor, threshold: int, seed: Tensor, stream: int) -> Tensor:
    return dropout(x, threshold, seed, stream) if threshold else x


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; int64 has a sign, so the high word goes by halves."""
    high = (((a * (b & 0xFFFF)) >> 16) + a * (b >> 16)) >> 16
    return high & _WORD, (a * b) & _WORD
