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
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from recllm.cascade import Prefix

DOMAIN = "recllm"
ENTER, LEAVE, AGAIN = "Enter", "Leave", "Again"
"""Operators that only stand in a graph while it is made."""
OWN_NUMBER = "layer_idx"
"""The attribute by which layers find their keys and values; it may differ between layers that are alike."""
OURS = frozenset(vars(nn.Module())) | {OWN_NUMBER}
"""Attributes of a module in which layers that are alike may differ: torch's own, which are compared otherwise."""
FEWEST = 3
"""Layers of a model from which on it is worth looking."""
NOT_UNDERSTOOD = -1
"""In the place of a kind: a call that cannot be repeated."""
PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)
"""Values that are compared as such."""
SAME = 1e-5
"""Largest difference between two layers that do the same with the same weights, as a share of what they change."""


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

    def is_like(self, other: "_Given") -> bool:
        """Whether two layers are given the same but for what varies, and that in the same shapes and dtypes."""
        if self.same != other.same or len(self.varying) != len(other.varying):
            return False
        pairs = list(zip(self.varying, other.varying, strict=True))
        if any(one.dtype != two.dtype or one.dim() != two.dim() for one, two in pairs):
            return False
        # Sizes are symbols while a model is traced, and two of them may be one by now.
        sizes = [size for one, two in pairs for size in zip(one.shape, two.shape, strict=True)]
        return all(statically_known_true(one == two) for one, two in sizes)


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
    _given: dict[int, _Given] = field(default_factory=dict)
    _inside: bool = False

    @property
    def firsts(self) -> list[int]:
        """Numbers of the layers that are traced."""
        return sorted(set(self.kinds))

    @contextmanager
    def traced(self) -> Iterator[None]:
        """With layers that are traced once of each kind."""
        self._left.clear()
        self._given.clear()
        with _instead(self.layers, self._forward):
            yield

    def _forward(self, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self._inside:
            return original(*args, **kwargs)
        kind, given = self.kinds[number], _given(self.layers[number], args, kwargs)
        if given is None:
            raise NotAlikeError(f"layer {number} is called in a way of its own")
        if kind == number:
            return self._first(number, given)
        if kind not in self._left or not given.is_like(self._given[kind]):
            raise NotAlikeError(f"layer {number} is given something else than layer {kind}")
        return _after(self.layers[number], given, _marked(AGAIN, number, given.varying, self._left[kind]))

    def _first(self, number: int, given: _Given) -> Any:  # noqa: ANN401
        args, kwargs = given.rebuild(_marked(ENTER, number, given.varying, given.varying), given.cache)
        self._inside = True
        try:
            found = torch.func.functional_call(self.layers[number], self.weights[number], args, kwargs)
        finally:
            self._inside = False
        results = _results(self.layers[number], found, given.cache)
        self._given[number], self._left[number] = given, _marked(LEAVE, number, results, results)
        return _after(self.layers[number], given, self._left[number])


def repeated_layers(module: nn.Module, values: Sequence[Tensor]) -> Repeated | None:
    """The layers of a transformers model in `module`, and which of them are alike; None where hardly any are.

    They are alike if they are built alike, are given the same beside what the last one made, where `values` are the
    arguments of `module`, and one does with the other's weights what the other does.
    """
    layers: list[nn.Module] = []
    for own in module.modules():
        if isinstance(own, GradientCheckpointingLayer) and not any(own in outer.modules() for outer in layers):
            layers.append(own)
    # Hooks would run twice, and what somebody has put in the place of a layer's own work would be lost.
    if len(layers) < FEWEST or any(_hooks(own) or "forward" in vars(own) for own in layers):
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
    seen: dict[int, tuple[Any, _Given]] = field(default_factory=dict)
    _trying: bool = False

    def forward(self, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self._trying:
            return original(*args, **kwargs)
        given = None if number in self.kinds else _given(self.layers[number], args, kwargs)
        found = original(*args, **kwargs)
        # A call that is not understood, a second one, or something else that comes out.
        if given is None or not isinstance(found, Tensor):
            self.kinds[number] = NOT_UNDERSTOOD
            return found
        built = _built(self.layers[number])
        near = [kind for kind, (other, before) in self.seen.items() if other == built and given.is_like(before)]
        self._trying = True
        try:
            self.kinds[number] = next((kind for kind in near if self._does(kind, number, given)), number)
        finally:
            self._trying = False
        if self.kinds[number] == number:
            self.seen[number] = built, given
        return found

    def _does(self, kind: int, number: int, given: _Given) -> bool:
        """Whether layer `kind` does with the weights of layer `number` what that one does.

        They are tried on random numbers: words of an example may be all the same, so that attention changes nothing,
        and channels that are huge inside a model would hide the others.
        """
        random = torch.Generator().manual_seed(number)
        drawn = [torch.randn(own.shape, generator=random, dtype=own.dtype) for own in given.varying]
        weights, results = weights_of(self.layers[number]), []
        for layer in (self.layers[kind], self.layers[number]):
            cache = None if given.cache is None else DynamicCache()
            args, kwargs = given.rebuild(drawn, cache)
            if (prefix := kwargs.get("recllm_prefix")) is not None:
                kwargs["recllm_prefix"] = _with_layer(prefix, _number(layer), drawn[1], drawn[2])
            try:
                found = torch.func.functional_call(layer, weights, args, kwargs)
                results.append(_results(layer, found, cache))
            except Exception:  # whatever a layer raises that takes other weights or arguments
                return False
        results[0][0], results[1][0] = results[0][0] - drawn[0], results[1][0] - drawn[0]
        return all(_equal(*pair) for pair in zip(*results, strict=True))


def _equal(one: Tensor, two: Tensor) -> bool:
    """Whether each channel is the same in both, up to rounding."""
    rows = tuple(range(one.dim() - 1))
    return one.shape == two.shape and bool(((one - two).abs().amax(rows) <= SAME * two.abs().amax(rows)).all())


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


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
                if name not in OURS and (name != "forward" or own is not layer)
            ],
            [_same(hook) for hook in _hooks(own)],
        )
        for path, own in layer.named_modules()
    ]
    return parts, [(name, own.shape, own.dtype) for name, own in weights_of(layer).items()]


def _results(layer: nn.Module, found: Any, cache: DynamicCache | None) -> list[Tensor]:  # noqa: ANN401
    """Hidden states, and the keys and values that were left in the cache.

    Raises:
        NotAlikeError: a layer gives something else.
    """
    if not isinstance(found, Tensor):
        raise NotAlikeError("a layer gives more than hidden states")
    if cache is None:
        return [found]
    number = _number(layer)
    if len(cache.layers) <= number:
        raise NotAlikeError("a layer keeps no keys and values")
    own = cache.layers[number]
    return [found, own.keys, own.values]


def _after(layer: nn.Module, given: _Given, left: Sequence[Tensor]) -> Tensor:
    """What a layer gives back, its keys and values left in the cache."""
    if given.cache is not None:
        number, layers = _number(layer), given.cache.layers
        while len(layers) <= number:
            layers.append(DynamicLayer())
        if not layers[number].is_initialized:
            layers[number].lazy_initialization(left[1], left[2])
        layers[number].keys, layers[number].values = left[1], left[2]
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
