"""Whether the forward of a module is running.

Nothing that belongs to one forward may be left for the next one, so what is kept for its duration is kept here. The
hooks are on the modules around adapter layers, not on these themselves.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Scope:
    """Is open while the forward of a module runs. :meth:`close` is called when it ends, also by an error."""

    def __init__(self, module: nn.Module) -> None:
        self.reset()
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end, always_call=True)

    def reset(self) -> None:
        """Makes it as it is outside of a forward. An interrupt (Ctrl-C) ends a forward without a call of our hook."""
        self.depth = 0  # above 1 if the forward calls itself

    def __getstate__(self) -> tuple[()]:
        return ()

    def __setstate__(self, state: tuple[()]) -> None:
        self.reset()  # nobody runs a copy yet

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.depth += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth = max(0, self.depth - 1)  # a hook that failed before ours has kept it from beginning
        if self.depth == 0:
            self.close()

    def close(self) -> None:
        """Lets go of what belongs to the forward that has ended."""


class Caller(Scope):
    """Opens around a module whose code may read the weight of an adapter layer, in place of calling the layer.

    Such code gets ``W + delta`` (:attr:`AdapterLinear.weight`). An adapter can follow every use of it but a write.
    """

    def reset(self) -> None:
        super().reset()
        self.read: list[tuple[str, Tensor, int]] = []  # names, weights and their versions when they were read

    def close(self) -> None:
        """Raises ValueError if a weight was written to."""
        read, self.read = self.read, []
        for name, weight, version in read:
            if weight._version != version:
                raise ValueError(
                    f"{name}: the model changes this weight in place during its forward, which an adapter cannot "
                    "follow; leave it out of targets"
                )


def reset_scopes(model: nn.Module) -> None:
    """Closes the scopes that an interrupt has left open; no forward may be running."""
    for _, _, scope in _hooks(model):
        scope.reset()


def without_scopes(model: nn.Module) -> None:
    """Removes all scopes from a model."""
    for module, key, _ in _hooks(model):
        module._forward_pre_hooks.pop(key, None)
        module._forward_hooks.pop(key, None)
        module._forward_hooks_always_called.pop(key, None)


def _hooks(model: nn.Module) -> Iterator[tuple[nn.Module, int, Scope]]:
    """Each hook of a scope: its module, its key, and the scope."""
    for module in model.modules():
        for key, hook in [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]:
            scope = getattr(hook, "__self__", None)
            if isinstance(scope, Scope):
                yield module, key, scope
