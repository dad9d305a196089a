"""Every example's own gradient, squared and added up over a batch, in one backward pass.

Example e's gradient of a linear layer is ``Σ_t g_t x_tᵀ`` over its tokens t: x is what the layer reads, g the gradient
of what it returns. Both are seen by hooks, so one backward pass serves all examples, and the weights' own gradients,
which would mix them, are never computed. Embeddings, norms, biases and adapters go the same way; any other module is
differentiated by itself, by ``torch.func``.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..nn.lora import LoRAEmbedding, LoRALinear, Update
from ..ops import ewc_accumulate_

EXAMPLES, ROWS = 2**18, 2**20
"""Most numbers of per-example gradients that are held at once: of several examples, and of some rows of one."""


class SquaredGradients:
    """Adds ``Σ_e (∇_e)²`` to sums, one for each parameter, while a batch goes through a model and back.

    Args:
        model: in evaluation mode; each row of what its modules read and return (dimension 0) is one example.
        params: by name, those whose gradients are wanted.
        head: a module that reads one row for each target, [n, K], instead of one for each example. None: all do, as in
            a classifier.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter], head: nn.Module | None) -> None:
        self.model, self.params = model, params
        self._head = None if head is None else {id(part) for part in head.modules()}
        names = {id(param): name for name, param in params.items()}
        wrapped = {id(m.base) for m in model.modules() if isinstance(m, LoRALinear | LoRAEmbedding)}
        users = {
            module: {part: names[id(param)] for part, param in own_parameters(module).items() if id(param) in names}
            for module in model.modules()
            if id(module) not in wrapped  # an adapted layer stands for the one inside it
        }
        self._wanted = {module: wanted for module, wanted in users.items() if wanted}

    @contextmanager
    def watching(self, size: int) -> Iterator[None]:
        """Inside, the model runs on ``size`` examples; then ``missed``, and the backward pass inside ``adding``."""
        self._size = size
        self._uses: Counter[str] = Counter()
        self._lookups: Counter[str] = Counter()
        self._ids: dict[str, Tensor] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._ruling = False
        device = next(iter(self.params.values())).device.type
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        frozen = [param for param in self.model.parameters() if param.requires_grad]
        hooks = [module.register_forward_hook(self._see, with_kwargs=True) for module in self._wanted]
        for param in frozen:
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param in frozen:
                param.requires_grad_(True)
            for hook in hooks:
                hook.remove()

    @contextmanager
    def adding(self, sums: Mapping[str, Tensor], counts: list[int]) -> Iterator[None]:
        """Inside, backward passes add to ``sums`` (of some of the params, contiguous, like them); ``counts`` are the
        examples' targets."""
        self._sums, self._counts = sums, counts
        yield
        self._sums = {}

    def missed(self) -> set[str]:
        """After the forward pass: the parameters whose gradients the backward pass will not give."""
        uses, lookups = self._uses, self._lookups
        return {name for name in self.params if (uses[name], lookups[name]) not in ((1, 0), (0, 1), (1, 1))}

    # Forward

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook: remember the input, and await the gradient of the output."""
        if self._ruling or not torch.is_grad_enabled() or not isinstance(output, Tensor) or not output.numel():
            return None  # a rule at work, a probe, or an output layer that is passed over (nn.heads)
        if type(module) not in RULES and (len(args) > 1 or kwargs):
            return None  # differentiated by itself it would miss them
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None or not self._is_by_example(module, x) or len(x) != len(output):
            return None
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        wanted = self._wanted[module]
        (self._uses if x.is_floating_point() else self._lookups).update(wanted.values())
        if type(module) is nn.Embedding:
            self._ids |= dict.fromkeys(wanted.values(), x)
        x = x.detach()
        output.register_hook(lambda g: self._take(module, wanted, x, g))
        return output

    def _is_by_example(self, module: nn.Module, x: Tensor) -> bool:
        if self._head is not None and id(module) not in self._head:
            return len(x) == self._size and x.dim() >= (3 if x.is_floating_point() else 2)
        return x.dim() == 2 or len(x) == self._size

    # Backward

    @torch.no_grad()
    def _take(self, module: nn.Module, wanted: dict[str, str], x: Tensor, g: Tensor) -> None:
        wanted = {part: name for part, name in wanted.items() if name in self._sums}
        if wanted:
            dtype = self._sums[next(iter(wanted.values()))].dtype
            x = x.to(dtype) if x.is_floating_point() else x
            self._ruling = True
            with torch.autocast(x.device.type, enabled=False):  # sums are fp32, and so are products of gradients
                RULES.get(type(module), SquaredGradients._other)(self, module, wanted, x, g.to(dtype))
            self._ruling = False

    def _linear(self, module: nn.Module, wanted: dict[str, str], x: Tensor, g: Tensor) -> None:
        if "bias" in wanted:
            self._vectors(wanted["bias"], g)
        if "weight" in wanted:
            self._product(wanted["weight"], *((x, g) if type(module) is Conv1D else (g, x)))

    def _embedding(self, module: nn.Embedding, wanted: dict[str, str], ids: Tensor, g: Tensor) -> None:
        g = g if module.padding_idx is None else g.masked_fill((ids == module.padding_idx)[..., None], 0.0)
        self._lookup(wanted["weight"], self._sums[wanted["weight"]], ids, g)

    def _norm(self, module: nn.LayerNorm | nn.RMSNorm, wanted: dict[str, str], x: Tensor, g: Tensor) -> None:
        normed: Any = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
        if "bias" in wanted:
            self._vectors(wanted["bias"], g)
        if "weight" in wanted:
            self._vectors(wanted["weight"], g * normed(x, module.normalized_shape, eps=module.eps))

    def _lora_linear(self, layer: LoRALinear, wanted: dict[str, str], x: Tensor, g: Tensor) -> None:
        """A is a linear layer that reads x, B one that reads ``x Aᵀ``."""
        if "base.bias" in wanted:
            self._vectors(wanted["base.bias"], g)
        for A, B, scaling, rows, names in _pieces(layer, wanted):
            part = scaling * (g if rows is None else g.index_select(-1, rows))
            if names[1]:
                self._product(names[1], part, x @ A.t().to(x.dtype))
            if names[0]:
                self._product(names[0], part @ B.to(x.dtype), x)

    def _lora_embedding(self, layer: LoRAEmbedding, wanted: dict[str, str], ids: Tensor, g: Tensor) -> None:
        """A is a table of columns, B a linear layer that reads what is looked up in it."""
        seen = g if layer.padding_idx is None else g.masked_fill((ids == layer.padding_idx)[..., None], 0.0)
        factor = getattr(layer.base, "embed_scale", 1.0)
        for A, B, scaling, _, names in _pieces(layer, wanted):
            if names[1]:
                self._product(names[1], scaling * factor * g, F.embedding(ids, A.t()).to(g.dtype))
            if names[0]:
                self._lookup(names[0], self._sums[names[0]].t(), ids, scaling * factor * (seen @ B.to(g.dtype)))

    def _other(self, module: nn.Module, wanted: dict[str, str], x: Tensor, g: Tensor) -> None:
        """A module of any kind: the gradients of its own parameters, example by example at once."""
        own = {part: getattr(module, part).detach() for part in wanted}

        def gradients(x: Tensor, g: Tensor) -> dict[str, Tensor]:
            def run(own: dict[str, Tensor]) -> Any:
                return torch.func.functional_call(module, own, (x[None],))[0]

            (found,) = torch.func.vjp(run, own)[1](g)
            return found

        autocast = torch.autocast(x.device.type, self._autocast, enabled=self._autocast is not None)
        with torch.enable_grad(), autocast:  # as the forward pass ran
            found = torch.func.vmap(gradients)(x, g.to(module(x[:1]).dtype))
        for part, name in wanted.items():
            self._sums[name] += found[part].to(self._sums[name].dtype).square().sum(0)

    # Sums

    def _product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add each example's ``(leftᵀ right)²``."""
        total = self._sums[name]
        if left.dim() == 2 and max(self._counts) == 1 and name not in self._ids:
            total.addmm_(left.square().t(), right.square())
        elif left.dim() == 2 or name in self._ids or 2 * total.numel() > EXAMPLES:
            for i, (a, b) in enumerate(zip(self._examples(left), self._examples(right), strict=True)):
                if name in self._ids:
                    with self._set_aside(name, a, b, self._ids[name][i]):
                        _add_squared_product(total, a, b)
                else:
                    _add_squared_product(total, a, b)
        else:
            parts = (torch.split(rows.flatten(1, -2), EXAMPLES // total.numel()) for rows in (left, right))
            for a, b in zip(*parts, strict=True):
                total.add_(torch.bmm(a.mT, b).square_().sum(0))

    def _vectors(self, name: str, rows: Tensor) -> None:
        """Add each example's ``(Σ_t row_t)²``."""
        if rows.dim() > 2:
            sums = rows.flatten(1, -2).sum(1)
        elif max(self._counts) == 1:
            sums = rows
        else:
            sums = torch.stack([example.sum(0) for example in self._examples(rows)])
        self._sums[name] += sums.square().sum(0)

    def _lookup(self, name: str, total: Tensor, ids: Tensor, g: Tensor) -> None:
        """Add each example's squared gradient of the rows that it looked up; of a table that is the head too, the
        head's gradient of those rows comes in before the square."""
        first = len(total) * torch.arange(len(ids), device=ids.device)[:, None]
        keys, place = torch.unique(ids.flatten(1) + first, return_inverse=True)
        gradient = g.new_zeros(len(keys), g.shape[-1]).index_add_(0, place.flatten(), g.flatten(0, -2))
        if name in self._kept:
            gradient += torch.cat(self._kept.pop(name))
        total.index_add_(0, keys % len(total), gradient.square_())

    @contextmanager
    def _set_aside(self, name: str, left: Tensor, right: Tensor, ids: Tensor) -> Iterator[None]:
        """Keep the rows that this example also looks up out of the sum, and their gradient for ``_lookup``."""
        total, rows = self._sums[name], torch.unique(ids)
        self._kept.setdefault(name, []).append(left[:, rows].t() @ right)
        before = total[rows]
        yield
        total[rows] = before

    def _examples(self, rows: Tensor) -> Iterator[Tensor]:
        """The matrix of each example."""
        return iter(torch.split(rows, self._counts) if rows.dim() == 2 else rows.flatten(1, -2))


def _add_squared_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += (leftᵀ right)²``, some rows at a time: the product of a large layer would leave the caches."""
    rows = max(1, ROWS // total.shape[1])
    for into, part in zip(torch.split(total, rows), torch.split(left, rows, 1), strict=True):
        ewc_accumulate_([into], [part.t() @ right])


RULES: dict[type[nn.Module], Callable[..., None]] = {
    nn.Linear: SquaredGradients._linear,
    Conv1D: SquaredGradients._linear,
    nn.Embedding: SquaredGradients._embedding,
    nn.LayerNorm: SquaredGradients._norm,
    nn.RMSNorm: SquaredGradients._norm,
    LoRALinear: SquaredGradients._lora_linear,
    LoRAEmbedding: SquaredGradients._lora_embedding,
}


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What a module itself uses, as it calls it; of an adapted layer, all that the layer does with its adapters."""
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, LoRALinear | LoRAEmbedding):
        own = dict(module.named_parameters())
    return {} if isinstance(module, Update | nn.ParameterDict) else own


def _pieces(
    layer: LoRALinear | LoRAEmbedding, wanted: Mapping[str, str]
) -> Iterator[tuple[Tensor, Tensor, float, Tensor | None, tuple[str | None, str | None]]]:
    """A, B, scaling, the rows of the output, and the names of A and B, of each piece of each adapter in force."""
    for adapter, weight in layer.state.in_force.items():
        if weight == 0.0 or adapter not in layer.adapters:
            continue
        update = layer.adapters[adapter]
        assert isinstance(update, Update)
        for part, piece in update.pieces().items():
            names = [wanted.get(f"adapters.{adapter}.lora_{side}.{part}") for side in "AB"]
            yield update.lora_A[part], update.lora_B[part], weight * update.scaling, piece.rows, (names[0], names[1])
