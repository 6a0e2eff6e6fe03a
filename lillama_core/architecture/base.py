"""What an architecture tells the core: where its stacks of blocks and its linear maps live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lillama_core.errors import UserError, nearest
from lillama_core.evaluation.base import Evaluation

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lillama_core.architecture.targets.base import TargetModule
    from lillama_core.architecture.targets.linear_map import MapChoice
    from lillama_core.data.modality import Modality


class Architecture:
    """The description of a family of models; a plugin subclasses or instantiates it.

    The smallest useful one states ``model_types`` and ``stacks``; everything else has a default that works
    for a model whose blocks hold ``nn.Linear`` modules and pass one hidden stream from block to block.
    """

    name: str = ""
    """What ``--architecture`` takes; defaults to the class name in lower case."""
    model_types: tuple[str, ...] = ()
    """Values of ``config.model_type`` that this architecture claims."""
    fallback: bool = False
    """Whether the claim is of the lowest rank: any other architecture that claims a model type wins over this one."""
    stacks: Mapping[str, str] = {}
    """Name of a stack -> path of its ``nn.ModuleList`` from the model, in the order of the forward pass."""
    read_after: Mapping[str, str] = {}
    """Name of a stack -> name of the setting of the config that says after which block its hidden states are read, as
    transformers counts them: 0 is what enters the first block, -1 what leaves the last. Blocks behind stay as they are.
    A stack that is not named is read after its last block."""
    maps: tuple[str, ...] = ()
    """Paths from the block of the linear maps to compress (``*`` matches one component); empty: all of them."""
    exclude: tuple[str, ...] = ()
    """Paths from the block of linear maps to leave alone."""
    optional: tuple[str, ...] = ()
    """Paths from the block of linear maps that are compressed only when the user includes them by name."""
    pinned: tuple[str, ...] = ()
    """Paths from the block of modules that decide (a router): while a student block learns, they decide as the
    teacher's did."""
    modality: str | Modality = "text"
    """What the models are fed: a name that ``lillama_modalities`` knows, or an object."""
    packed: Mapping[str, int] = {}
    """Name of an input that the model takes as one row of things for all samples (the patches of all images) -> with
    how many dimensions it does. Data has one more, [samples, n, ...]: as many things for each sample."""
    auto_class: str = "AutoModelForCausalLM"
    """The transformers auto class that loads the models."""
    evaluation: Evaluation = Evaluation()
    remarks: tuple[str, ...] = ()
    """Lines that the user is told before a run: what was found rather than declared."""
    tiny_config: Mapping[str, Any] = {}
    """Settings of the config that make a tiny model for tests, where shrinking the usual dimensions does not."""

    def __init__(
        self,
        *,
        name: str | None = None,
        model_types: tuple[str, ...] | None = None,
        stacks: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name or self.name or type(self).__name__.lower()
        if model_types is not None:
            self.model_types = model_types
        if stacks is not None:
            self.stacks = stacks

    def check_declaration(self) -> None:
        """Raise TypeError for an attribute that is misspelt or of a wrong type: it would be passed over in silence."""
        known = [name for name in dir(Architecture) if not name.startswith("_")]
        for name in dir(self):
            # What is like no attribute of an architecture is the plugin's own.
            if not name.startswith("_") and name not in known and (advice := nearest(name, known, cutoff=0.8)):
                raise TypeError(f"architecture {self.name!r} has no attribute {name!r}{advice}")
        for name in ("model_types", "maps", "exclude", "optional", "pinned", "remarks"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"{name} of architecture {self.name!r} must be a tuple of strings, not {value!r}")
        if not isinstance(self.fallback, bool):
            raise TypeError(f"fallback of architecture {self.name!r} must be True or False, not {self.fallback!r}")
        stacks = self.stacks
        if not isinstance(stacks, Mapping) or not all(
            isinstance(part, str) for item in stacks.items() for part in item
        ):
            raise TypeError(
                f"stacks of architecture {self.name!r} must be a dict of name to path"
                f" ({{'decoder': 'model.layers'}}), not {stacks!r}"
            )
        if not stacks:
            raise TypeError(f"architecture {self.name!r} has no stacks: say where its lists of blocks are")
        if not isinstance(self.read_after, Mapping) or not set(self.read_after) <= set(self.stacks):
            raise TypeError(
                f"read_after of architecture {self.name!r} must be a dict of the name of a stack to that of a setting,"
                f" not {self.read_after!r}; its stacks are {', '.join(self.stacks)}"
            )

        packed = self.packed
        if not isinstance(packed, Mapping) or not all(type(dimensions) is int for dimensions in packed.values()):
            raise TypeError(
                f"packed of architecture {self.name!r} must be a dict of the name of an input to the number of"
                f" dimensions that the model takes it with ({{'pixel_values': 2}}), not {packed!r}"
            )

    def block_paths(self, model: nn.Module, stack: str) -> list[str]:
        """The paths from ``model`` of the blocks of ``stack``, in order, without those that nobody reads.

        Raises UserError where the config says that a stack is read before its first block, or at several places.
        """
        path = self.stacks[stack]
        paths = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]
        if stack not in self.read_after:
            return paths
        config: Any = model.config
        place = getattr(config, self.read_after[stack])
        last = len(paths) + 1 + place if isinstance(place, int) and place < 0 else place
        if not isinstance(last, int) or not 1 <= last <= len(paths):
            raise UserError(
                f"{self.read_after[stack]} of the config is {place}: the {len(paths)} blocks of {stack!r} can be"
                " compressed only if their hidden states are read at one place, behind a block"
            )
        return paths[:last]

    def targets(self, block: nn.Module, choice: MapChoice) -> list[TargetModule]:
        """The modules of ``block`` that are swapped, in module order."""
        # Here, so that declaring an architecture does not load torch.
        from lillama_core.architecture.targets.convolution import convolution_targets
        from lillama_core.architecture.targets.experts import find_targets
        from lillama_core.architecture.targets.grouped import grouped_targets
        from lillama_core.architecture.targets.sorted_rows import sorted_targets

        finders = (find_targets, sorted_targets, convolution_targets, grouped_targets)
        patterns = (self.maps, (*self.exclude, *self.optional), choice)
        return [target for find in finders for target in find(block, *patterns)]

    def call_block(
        self, block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Run one block on ``hidden`` [batch, length, width] with its recorded other arguments."""
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    def adapt(self, model: nn.Module) -> None:
        """Choose how the modules of ``model`` run, when it was loaded: dense, or compressed, or without its head.

        For models that pick a kernel, or read a module's weight instead of calling it. What the model computes and
        what is saved must stay the same. The weights may be elsewhere: blocks that are read later are copies of those
        that ``model`` has now, with their hooks and flags. Whoever declares ``packed`` inputs calls this one, too.
        """
        if self.packed:
            from lillama_core.data.modality import pack_on_call

            pack_on_call(model, self.packed)

    def between_blocks(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the model does to the hidden stream after block ``index``; nothing, for most."""
        return hidden
