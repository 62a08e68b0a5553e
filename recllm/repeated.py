"""Layers that are alike, traced once: torch's exporter takes seconds for each layer, and a language model has dozens.

While a model is traced, the first layer of each kind is traced as it is, between two marks; of the others the graph
gets a node with what they are given. In the finished graph what lies between the marks becomes a function of its
weights, and every one of those nodes a call of it with the weights of its own layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from recllm.cascade import SAME, Prefix

DOMAIN = "recllm"
ENTER, LEAVE, AGAIN = "Enter", "Leave", "Again"
"""Operators that only stand in a graph while it is made."""
OWN_NUMBER = "layer_idx"
"""The attribute by which layers find their keys and values; it may differ between layers that are alike."""
OURS = ("forward", "training", OWN_NUMBER)
FEWEST = 3
"""Layers of a model from which on it is worth looking."""
NOT_UNDERSTOOD = -1
PLAIN = (int, float, str, bool, tuple, list, dict, type(None), torch.dtype)


class NotAlikeError(Exception):
    """What was traced cannot be repeated; the model is to be traced whole."""


@dataclass
class _Given:
    """What a layer is called with.

    Attributes:
        varying: hidden states, and where there are any the keys and values of its prefix.
        same: everything else, to be compared between layers.
        rebuild: arguments with other varying tensors, and another cache where one is given.
        cache: where it leaves its keys and values.
    """

    varying: list[Tensor]
    same: Any
    rebuild: Callable[[Sequence[Tensor], DynamicCache | None], tuple[tuple[Any, ...], dict[str, Any]]]
    cache: DynamicCache | None


@dataclass(eq=False)
class Repeated:
    """The layers of a model while it is traced.

    Attributes:
        layers: all of them.
        kinds: per layer the number of the first layer that does the same with its own weights.
        weights: per first layer of a kind what stands for its weights.
    """

    layers: list[nn.Module]
    kinds: list[int]
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _left: dict[int, list[Tensor]] = field(default_factory=dict)
    _same: dict[int, Any] = field(default_factory=dict)
    _inside: bool = False

    @property
    def firsts(self) -> list[int]:
        """Numbers of the layers that are traced."""
        return sorted(set(self.kinds))

    @contextmanager
    def traced(self) -> Iterator[None]:
        """With layers that are traced once of each kind."""
        with _instead(self.layers, self._forward):
            yield

    def _forward(self, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self._inside:
            return original(*args, **kwargs)
        kind, given = self.kinds[number], _given(self.layers[number], args, kwargs)
        if given is None:
            raise NotAlikeError
        if kind == number:
            return self._first(number, given)
        if kind not in self._left or given.same != self._same[kind]:
            raise NotAlikeError
        return _after(self.layers[number], given, _marked(AGAIN, number, given.varying, self._left[kind]))

    def _first(self, number: int, given: _Given) -> Any:  # noqa: ANN401
        args, kwargs = given.rebuild(_marked(ENTER, number, given.varying, given.varying), given.cache)
        self._inside = True
        try:
            found = torch.func.functional_call(self.layers[number], self.weights[number], args, kwargs)
        finally:
            self._inside = False
        results = _results(self.layers[number], found, given.cache)
        self._same[number], self._left[number] = given.same, _marked(LEAVE, number, results, results)
        return _after(self.layers[number], given, self._left[number])


def repeated_layers(module: nn.Module, values: Sequence[Tensor]) -> Repeated | None:
    """The layers of a transformers model in `module`, and which of them are alike; None where hardly any are.

    They are alike if they are built alike, are given the same beside what the last one made, and one does with the
    other's weights what the other does: on `values`, the arguments of `module`.
    """
    layers: list[nn.Module] = []
    for own in module.modules():
        if isinstance(own, GradientCheckpointingLayer) and not any(own in outer.modules() for outer in layers):
            layers.append(own)
    if len(layers) < FEWEST:
        return None
    survey = _Survey(layers)
    with _instead(layers, survey.forward), torch.no_grad():
        module(*values)
    kinds = [survey.kinds.get(number, NOT_UNDERSTOOD) for number in range(len(layers))]
    if NOT_UNDERSTOOD in kinds or len(set(kinds)) > len(layers) // 2:
        return None
    return Repeated(layers, kinds)


@dataclass(eq=False)
class _Survey:
    """Finds out, while a model runs, which of its layers are alike.

    Attributes:
        layers: all of them.
        kinds: per layer the number of the first one that is like it.
        seen: per first layer how it is built and what it was given.
    """

    layers: Sequence[nn.Module]
    kinds: dict[int, int] = field(default_factory=dict)
    seen: dict[int, Any] = field(default_factory=dict)
    _trying: bool = False

    def forward(self, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self._trying:
            return original(*args, **kwargs)
        given = None if number in self.kinds else _given(self.layers[number], args, kwargs)
        found = original(*args, **kwargs)
        if given is None:  # a call that is not understood, or a second one
            self.kinds[number] = NOT_UNDERSTOOD
            return found
        what = _built(self.layers[number]), given.same
        self._trying = True
        try:
            alike = (
                kind for kind, other in self.seen.items() if other == what and self._does(kind, number, given, found)
            )
            self.kinds[number] = next(alike, number)
        finally:
            self._trying = False
        if self.kinds[number] == number:
            self.seen[number] = what
        return found

    def _does(self, kind: int, number: int, given: _Given, found: Any) -> bool:  # noqa: ANN401
        """Whether layer `kind` does with the weights of layer `number` what that one did."""
        first, layer = self.layers[kind], self.layers[number]
        cache = None if given.cache is None else DynamicCache()
        args, kwargs = given.rebuild(given.varying, cache)
        if (prefix := kwargs.get("recllm_prefix")) is not None:
            own = _number(layer)
            kwargs["recllm_prefix"] = _with_layer(prefix, _number(first), prefix.keys[own], prefix.values[own])
        other = torch.func.functional_call(first, weights_of(layer), args, kwargs)
        pairs = zip(_results(first, other, cache), _results(layer, found, given.cache), strict=True)
        return all(bool((one - two).abs().max() <= SAME * two.abs().max()) for one, two in pairs)


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer by name."""
    return {name: own.detach() for name, own in (*layer.named_parameters(), *layer.named_buffers())}


@contextmanager
def _instead(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """With `forward(number, original, …)` in the place of what layers do."""
    for number, layer in enumerate(layers):
        layer.forward = partial(forward, number, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _given(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Given | None:
    """Take a call apart; None where it is none that can be repeated."""
    number = _number(layer)
    name = None if args else "hidden_states"
    hidden = args[0] if args else kwargs.get("hidden_states")
    prefix = kwargs.get("recllm_prefix")
    caches = [own for own in (*args, *kwargs.values()) if isinstance(own, DynamicCache)]
    if not isinstance(hidden, Tensor) or len(caches) > 1 or ((caches or prefix is not None) and number < 0):
        return None
    cache = caches[0] if caches else None
    if cache is not None and len(cache.layers) > number and cache.layers[number].get_seq_length():
        return None  # it goes on from something, which belongs to this layer alone
    varying = [hidden] if prefix is None else [hidden, prefix.keys[number], prefix.values[number]]

    def rebuild(tensors: Sequence[Tensor], into: DynamicCache | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = {key: into if isinstance(value, DynamicCache) else value for key, value in kwargs.items()}
        positional = tuple(into if isinstance(value, DynamicCache) else value for value in args)
        if name is None:
            positional = (tensors[0], *positional[1:])
        else:
            own[name] = tensors[0]
        if prefix is not None:
            own["recllm_prefix"] = _with_layer(prefix, number, tensors[1], tensors[2])
        return positional, own

    rest = {key: value for key, value in kwargs.items() if key not in (name, "recllm_prefix")}
    about = None if prefix is None else (_Same(prefix.lengths), prefix.padded)
    return _Given(varying, (_same(args[1:]), _same(rest), about), rebuild, cache)


def _number(layer: nn.Module) -> int:
    """The number under which a layer keeps keys and values; −1 for one that has none."""
    numbers = (getattr(own, OWN_NUMBER, None) for own in layer.modules())
    return next((int(number) for number in numbers if number is not None), -1)


def _with_layer(prefix: Prefix, number: int, keys: Tensor, values: Tensor) -> Prefix:
    before, behind = list(prefix.keys), list(prefix.values)
    before[number], behind[number] = keys, values
    return replace(prefix, keys=tuple(before), values=tuple(behind))


@dataclass(frozen=True, eq=False)
class _Same:
    """An object that is the same as itself only; kept, so that no other gets its place in memory."""

    own: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.own is other.own

    __hash__ = object.__hash__


def _same(value: Any) -> Any:  # noqa: ANN401  whatever a layer is given
    if isinstance(value, tuple | list):
        return tuple(_same(own) for own in value)
    if isinstance(value, dict):
        return tuple((key, _same(own)) for key, own in sorted(value.items()))
    if isinstance(value, partial):  # of two that are made alike one is not the other
        return "partial", _Same(value.func), _same(value.args), _same(value.keywords)
    return value if isinstance(value, PLAIN) else _Same(value)


def _built(layer: nn.Module) -> Any:  # noqa: ANN401  only compared
    """What a layer is beside its weights."""
    parts = [
        (
            path,
            type(own),
            [
                (name, _same(value))
                for name, value in sorted(vars(own).items())
                if not name.startswith("_") and name not in OURS
            ],
            [[_Same(hook) for hook in hooks.values()] for hooks in (own._forward_hooks, own._forward_pre_hooks)],
        )
        for path, own in layer.named_modules()
    ]
    return parts, [(name, own.shape, own.dtype) for name, own in weights_of(layer).items()]


def _results(layer: nn.Module, found: Any, cache: DynamicCache | None) -> list[Tensor]:  # noqa: ANN401
    """Hidden states, and the keys and values that were left in the cache.

    Raises:
        NotAlikeError: a layer gives something else.
    """
    hidden = found[0] if isinstance(found, tuple) and len(found) == 1 else found
    if not isinstance(hidden, Tensor):
        raise NotAlikeError
    if cache is None:
        return [hidden]
    number = _number(layer)
    if len(cache.layers) <= number:
        raise NotAlikeError
    own = cache.layers[number]
    return [hidden, own.keys, own.values]


def _after(layer: nn.Module, given: _Given, left: Sequence[Tensor]) -> Any:  # noqa: ANN401
    if given.cache is not None:
        number = _number(layer)
        given.cache.update(left[1], left[2], number)
        own = given.cache.layers[number]
        own.keys, own.values = left[1], left[2]
    return left[0]


def _marked(operator: str, number: int, inputs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return list(
        torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{operator}",
            tuple(inputs),
            {"number": number},
            dtypes=[own.dtype for own in like],
            shapes=[own.shape for own in like],
            version=1,
        )
    )


class WithWeights(nn.Module):
    """A module whose first layers of each kind take their weights as further arguments."""

    def __init__(self, module: nn.Module, repeated: Repeated, arguments: int) -> None:
        super().__init__()
        self.module, self.repeated, self.arguments = module, repeated, arguments
        self.names = {number: list(weights_of(repeated.layers[number])) for number in repeated.firsts}

    def forward(self, *given: Tensor) -> Any:  # noqa: ANN401  as the module's
        """What the module does with the first of the arguments."""
        rest = iter(given[self.arguments :])
        for number, names in self.names.items():
            self.repeated.weights[number] = {name: next(rest) for name in names}
        with self.repeated.traced():
            return self.module(*given[: self.arguments])
