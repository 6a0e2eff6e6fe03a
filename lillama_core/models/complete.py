"""Whether a checkpoint holds the weights of the model that it is loaded as: neither fewer nor more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lillama_core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lillama_core.architecture.base import Architecture
    from lillama_core.models.source import ModelSource


def check_complete(
    source: ModelSource, architecture: Architecture, model: Any, missing: Iterable[str], unexpected: Iterable[str]
) -> None:
    """Raise UserError for parameters of ``model`` among ``missing``, and for weights that would wrongly be dropped.

    Buffers may be missing: they are computed. Weights may be left over where the model is of the class that its config
    names: those of a head that it lacks, say.
    """
    import transformers

    # transformers would fill them with random numbers.
    absent = sorted(set(missing) & {name for name, _ in model.named_parameters(remove_duplicate=False)})
    named = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    other = ""
    if named != type(model).__name__ and hasattr(transformers, named):
        other = f"; it is a {named}, which architecture {architecture.name!r} does not load: try --architecture auto"
    if absent:
        raise UserError(f"model {source.spec!r} lacks {len(absent)} of its weights, such as {absent[0]}{other}")
    dropped = sorted(unexpected)
    if not getattr(model.config, "architectures", None) and architecture.auto_class == "AutoModel":
        other = "; its config names no class to load it by: add 'architectures' to config.json"
    if dropped and other:
        raise UserError(
            f"model {source.spec!r} has {len(dropped)} weights that would be dropped, such as {dropped[0]}{other}"
        )
