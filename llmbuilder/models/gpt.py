"""The native language model: a plain, modern decoder in one file.

    x = embedding(ids)
    for each block:  x = x + attention(norm(x));  x = x + mlp(norm(x))
    logits = head(norm(x))

RMSNorm before each part (arXiv 1910.07467), rotary positions (2104.09864), scaled dot-product attention (1706.03762),
SwiGLU (2002.05202), no biases, and a head that shares the embedding's weight unless told otherwise (1608.05859). With
the same weights it computes what Llama computes.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import ops
from ..errors import ConfigError, LLMBuilderError

ROTARY_BASE = 10_000.0
NORM_EPS = 1e-5
INIT_STD = 0.02


@dataclasses.dataclass
class GPTConfig:
    """The shape of a :class:`GPT`.

    Args:
        vocab_size: number of token ids.
        n_layer: number of blocks.
        n_head: attention heads; must divide ``n_embd`` into heads of even size.
        n_embd: width of the hidden state.
        block_size: longest sequence, in tokens.
        dropout: probability of zero after the embedding, in attention, and before each residual sum; in [0, 1).
        tie_word_embeddings: the head uses the embedding's weight (one matrix fewer, usual for small models).

    Raises:
        ConfigError: a size below 1, heads that don't fit, or a probability outside [0, 1).
    """

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    dropout: float = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"GPTConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % (2 * self.n_head):
            raise ConfigError(
                f"GPTConfig: n_embd ({self.n_embd}) must be an even multiple of n_head ({self.n_head}), "
                "because rotary positions turn pairs of numbers within a head"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"GPTConfig: dropout must lie in [0, 1), got {self.dropout}")

    @property
    def n_hidden(self) -> int:
        """Width inside the MLP: 8/3 of ``n_embd`` (three matrices cost what two of 4x would), in steps of 64."""
        return 64 * -(-8 * self.n_embd // (3 * 64))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


class Dropout(nn.Dropout):
    """``nn.Dropout`` that draws its mask with the library's own operator: the same meaning, far faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p) if self.training else x


class KeyValues:
    """Keys and values that one layer has seen, [B, heads, tokens, head size]; grows during generation."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values; returns all of them."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


class Attention(nn.Module):
    """Causal self-attention over ``n_head`` heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.key = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.value = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.output = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # Never called: the fused attention drops its own weights. A module, so that all p's are found in one way.
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor | None, past: KeyValues | None
    ) -> Tensor:
        def heads(y: Tensor) -> Tensor:  # [B, T, C] -> [B, heads, T, head size]
            return y.reshape(*y.shape[:2], self.n_head, -1).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past is not None:
            key, value = past.extend(key, value)
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, visible, dropout_p=p, is_causal=visible is None)
        return self.output(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and MLP, each behind its norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.n_embd, eps=NORM_EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.n_embd, eps=NORM_EPS)
        self.mlp = MLP(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor | None, past: KeyValues | None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, visible, past))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """A decoder-only language model; see the head of this file for its formula.

    Weights start as N(0, 0.02²), those that write to the residual stream smaller by sqrt(2·n_layer), so that its
    variance doesn't grow with depth (GPT-2). ``tokenizer`` is what :func:`save_model` stores beside the weights.
    """

    tokenizer: PreTrainedTokenizerFast | None = None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.n_embd)
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd, _weight=weight)  # filled below, once
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=NORM_EPS)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        self._checkpointing: dict[str, Any] | None = None
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:  # on meta, weights are on their way from a file
                writes = name.endswith(("attention.output.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=INIT_STD / (2 * config.n_layer) ** 0.5 if writes else INIT_STD)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: list[KeyValues] | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at each position.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, S] of 0/1 (0: padding, seen by nobody), or [B, 1, T, S] boolean (True: may attend),
                which then replaces the causal mask; S counts the tokens of the cache too.
            position_ids: [B, T] int64; counted from the start of the sequence when None.
            labels: [B, T] int64, -100 where there is no target; the shift by one happens here.
            past_key_values: the cache that an earlier call returned; extended in place.
            use_cache: return a cache.
            logits_to_keep: compute logits of the last so many positions only; 0 means all.

        Returns:
            ``.logits`` [B, T or logits_to_keep, vocab_size]; ``.loss``, the mean cross-entropy in fp32 over the
            targets, when ``labels`` are given; ``.past_key_values`` with ``use_cache``.

        Raises:
            LLMBuilderError: the sequence is longer than ``block_size``, or a mask has another shape or dtype.
        """
        if past_key_values is None and use_cache:
            past_key_values = [KeyValues() for _ in self.blocks]
        seen = len(past_key_values[0]) if past_key_values else 0
        length = input_ids.shape[1]
        if position_ids is None:
            if seen + length > self.config.block_size:
                raise LLMBuilderError(
                    f"GPT: a sequence of {seen + length} tokens is longer than the model's block_size of "
                    f"{self.config.block_size}; shorten it or build the model with a larger block_size"
                )
            position_ids = torch.arange(seen, seen + length, device=input_ids.device)[None]

        x = self.dropout(self.embedding(input_ids))
        rotary = rotary_angles(position_ids, self.config.n_embd // self.config.n_head, x.dtype)
        visible = visibility(attention_mask, length, seen + length, input_ids.device)
        for i, block in enumerate(self.blocks):
            past = past_key_values[i] if past_key_values else None
            if self._checkpointing is not None and self.training:
                x = checkpoint(block, x, rotary, visible, past, **self._checkpointing)
            else:
                x = block(x, rotary, visible, past)
        logits = self.head(self.norm(x[:, -logits_to_keep:]))

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, as transformers calls it."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head, as transformers calls it."""
        return self.head

    @torch.no_grad()
    def resize_token_embeddings(self, new_num_tokens: int, mean_resizing: bool = False) -> nn.Module:
        """Give the vocabulary another size, as transformers calls it: rows that stay keep their bits, new ones are 0.

        ``mean_resizing`` is there for transformers' callers, and must be False.
        """
        if mean_resizing:
            raise ConfigError("resize_token_embeddings: fill new rows yourself, and give mean_resizing=False")
        tied = self.head.weight is self.embedding.weight
        kept = min(new_num_tokens, self.config.vocab_size)
        for layer in (self.embedding, self.head):
            weight = layer.weight.new_zeros(new_num_tokens, layer.weight.shape[1])
            weight[:kept] = layer.weight[:kept]
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        if tied:
            self.head.weight = self.embedding.weight
        self.embedding.num_embeddings = self.head.out_features = new_num_tokens
        self.config = dataclasses.replace(self.config, vocab_size=new_num_tokens)
        return self.embedding

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Keep only each block's input for the backward pass, and compute the rest again (in training mode).

        Args:
            gradient_checkpointing_kwargs: handed to ``torch.utils.checkpoint.checkpoint``.
        """
        self._checkpointing = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self._checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self._checkpointing is not None


def rotary_angles(position_ids: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, T, size] of position · 10000^(-2i/size), computed in fp32, the two halves alike."""
    pairs = torch.arange(0, size, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[..., None].float() * ROTARY_BASE ** (-pairs / size)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + size/2]) by its angle, in x's dtype."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], dim=-1) * sin.to(x.dtype)


def visibility(mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Which keys each query sees, [B or 1, 1, queries, keys] boolean; None stands for plain causal attention.

    A query that sees nothing, as padding may, gets zeros from torch's attention.
    """
    if mask is None and queries == keys:
        return None
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if mask is None:
        return causal[None, None]
    if mask.dim() == 2 and mask.shape[1] == keys:
        return causal & mask.bool()[:, None, None]
    if mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[2:] == (queries, keys):
        return mask
    raise LLMBuilderError(
        f"GPT: attention_mask must be [batch, {keys}] of 0 and 1, or [batch, 1, {queries}, {keys}] boolean; "
        f"got {list(mask.shape)} of {mask.dtype}"
    )
