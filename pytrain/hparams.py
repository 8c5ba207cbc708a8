"""What a module or a data module was made with: kept, and saved in checkpoints."""

from __future__ import annotations

import inspect
from typing import Any


class HParams(dict[str, Any]):
    """Hyperparameters: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"hparams has no {name!r}, but {list(self)}") from None


class Hyperparameters:
    """Keeps the arguments of `__init__`.

    Attributes:
        hparams: what `save_hyperparameters` has kept.
    """

    @property
    def hparams(self) -> HParams:
        found: HParams = self.__dict__.setdefault("_hparams", HParams())
        return found

    def save_hyperparameters(self, *names: str, ignore: tuple[str, ...] | list[str] = ()) -> None:
        """Keep the arguments of the `__init__` that calls this in `self.hparams`, and in checkpoints.

        Args:
            names: of the arguments to keep; none: all.
            ignore: names that are not kept, such as a module's.

        Raises:
            TypeError: a name is no str.
            ValueError: there is no such argument.
        """
        for i, name in enumerate((*names, *ignore)):
            if not isinstance(name, str):
                raise TypeError(
                    f"save_hyperparameters: argument {i} must be the name of an argument of __init__, a str, got "
                    f"{type(name).__name__}; without names all arguments are kept"
                )
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        values = {} if caller is None else dict(inspect.getargvalues(caller).locals)
        given = inspect.signature(type(self).__init__).parameters
        found: dict[str, Any] = {}
        for name, parameter in list(given.items())[1:]:
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                found |= values.get(name, {})
            elif name in values and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
                found[name] = values[name]
        unknown = [name for name in (*names, *ignore) if name not in found]
        if unknown:
            raise ValueError(
                f"save_hyperparameters: {type(self).__name__} has no arguments {unknown}, but {list(found)}"
            )
        self.hparams.update({name: found[name] for name in names or found if name not in ignore})
