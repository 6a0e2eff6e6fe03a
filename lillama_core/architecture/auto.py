"""``--architecture auto``: the description of a model that no plugin knows, read off the model itself.

Everything is found on the meta device, from the config alone, and said in ``remarks``. What is not clear is not
guessed: the error says what was seen.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.targets.expert_layouts import fused_experts
from lillama_core.architecture.targets.linear import linear_targets
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.data.comparable import ComparableModality
from lillama_core.data.images.modality import Images
from lillama_core.data.modality import Modality
from lillama_core.data.text.encoder import EncoderDecoderText, EncoderText
from lillama_core.data.text.modality import Text
from lillama_core.errors import UserError
from lillama_core.evaluation.base import Evaluation, Metric
from lillama_core.evaluation.metrics import Footprint, Perplexity
from lillama_core.evaluation.metrics.output_error import OutputError, run_once
from lillama_core.models.transformers_adapter import causal_classes, is_encoder_family

AUTO = "auto"
"""The name of this architecture on the command line."""


class GenericArchitecture(Architecture):
    """One model's stacks of like blocks, all their linear maps, and an evaluation that any model has."""

    name = AUTO

    def __init__(self, config: Any, model: nn.Module, class_name: str) -> None:
        """``model`` is the model of ``config`` on the meta device. Raises UserError when it is not clear."""
        super().__init__(stacks=find_stacks(model))
        self.auto_class = class_name
        self.modality = _modality(config, model, len(self.stacks))
        self.evaluation = _evaluation(self.modality)
        self.remarks = tuple(self._found(config, model))

    def adapt(self, model: nn.Module) -> None:
        # A model may halve its hidden states every so many blocks, and divide some weights in place to match: in a
        # low-rank layer the quotient of the product would be lost. Without both it computes the same in fp32 or
        # bfloat16, and the config keeps it that way.
        config: Any = model.config
        if getattr(config, "rescale_every", 0):
            config.rescale_every = 0

    def _found(self, config: Any, model: nn.Module) -> list[str]:
        """Lines that say everything that was found and decided."""
        lines = [f"auto: {type(model).__name__}, loaded by {self.auto_class}"]
        for name, path in self.stacks.items():
            modules = model.get_submodule(path)
            assert isinstance(modules, nn.ModuleList)
            # Whether experts of an unknown layout may stay is the user's choice, which is not known here.
            unknown = tuple(n for block in modules for n, known in fused_experts(block).items() if not known)
            targets = [target for block in modules for target in self.targets(block, MapChoice(exclude=unknown))]
            counts = Counter(m.name for target in targets for m in target.maps)
            shapes = {m.name: f"{m.out_features}x{m.in_features}" for target in targets for m in target.maps}
            maps = ", ".join(
                f"{map_} {shapes[map_]}" + ("" if count == len(modules) else f" (in {count} of the blocks)")
                for map_, count in counts.items()
            )
            blocks = f"{len(modules)} blocks of {type(modules[0]).__name__}"
            lines.append(f"auto: stack {name} at {path}, {blocks}, {len(counts)} maps in a block: {maps}")
            held = tuple(f"{target.name}." for target in targets)
            # Vectors may be stored with empty dimensions around them.
            tables = {n for b in modules for n, p in b.named_parameters() if sum(size > 1 for size in p.shape) > 2}
            others = sorted(n for n in tables if not n.startswith(held))
            if others:
                lines.append(f"auto: not linear layers, left dense: {', '.join(others)}")
        if isinstance(self.modality, ComparableModality):
            lines.append(f"auto: fed {self.modality.feeds}; calibration: {self.modality.calibrates}")
        else:
            lines.append("auto: fed input_ids, rows of text; calibration: named text, or text that it writes itself")
        lines.append(f"auto: evaluated by {', '.join(metric.name for metric in self.evaluation.metrics)}")
        if getattr(config, "rescale_every", 0):
            lines.append(
                f"auto: rescale_every is {config.rescale_every}; set to 0, in the result's config too: weights of"
                " low-rank layers cannot be divided in place, and the outputs are the same"
            )
        return lines


def discover(config: Any, trust_remote_code: bool = False) -> GenericArchitecture:
    """The generic architecture for a model of ``config``; raises UserError that says what was seen instead."""
    from lillama_core.models.loading import meta_model

    class_name = _class_name(config)
    blank = Architecture(name=AUTO)
    blank.auto_class = class_name
    return GenericArchitecture(config, meta_model(config, blank, trust_remote_code), class_name)


def _class_name(config: Any) -> str:
    """The name in transformers of the class that loads the model: its own, or an auto class."""
    import transformers

    named = getattr(config, "architectures", None) or [""]
    causal = causal_classes()
    if not named[0] and config.model_type in causal and not is_encoder_family(config.model_type):
        # Files in GGUF do not name a class, nor do some configs: what only ever writes text has a head.
        return causal[config.model_type]
    if named[0] and hasattr(transformers, named[0]):
        return str(named[0])
    remote = getattr(config, "auto_map", None) or {}
    own = [key for key, value in remote.items() if key.startswith("AutoModel") and named[0] and named[0] in str(value)]
    return own[0] if own and hasattr(transformers, own[0]) else "AutoModel"


def find_stacks(model: nn.Module) -> dict[str, str]:
    """Name -> path of the model's lists of like blocks, in the order of the forward pass.

    A stack is an ``nn.ModuleList`` of modules of one class that hold linear maps, and lies in no other such list. One
    is a model's only stream; two are an encoder and a decoder if their paths say so. Raises UserError for all else.
    """
    seen: list[str] = []
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        kinds = Counter(type(item).__name__ for item in module)
        maps = sum(len(linear_targets(item)) for item in module)
        if maps:
            what = " and ".join(f"{n} {kind}" for kind, n in kinds.items())
            seen.append(f"{path} ({what}, {maps} linear maps)")
        if maps and len(kinds) == 1 and not isinstance(module[0], nn.Linear):
            found.append(path)
    kind = type(model).__name__
    advice = "describe it with a plugin: see 'Add an architecture' in the README"
    if not found:
        lists = f"; lists of modules with linear maps: {'; '.join(seen)}" if seen else ""
        raise UserError(f"{kind} has no list of blocks of one class with linear maps in them{lists}; {advice}")
    if len(found) == 1:
        (path,) = found
        # Named for what it is called there, if that is one of the two usual words.
        words = [w for w in ("encoder", "decoder") if w in path.split(".")]
        return {words[0] if len(words) == 1 else "blocks": path}
    encoders = [path for path in found if "encoder" in path.split(".") and "decoder" not in path.split(".")]
    decoders = [path for path in found if "decoder" in path.split(".")]
    both = bool(getattr(model.config, "is_encoder_decoder", False)) and len(found) == 2
    if both and len(encoders) == len(decoders) == 1:
        return {"encoder": encoders[0], "decoder": decoders[0]}
    raise UserError(
        f"{kind} has {len(found)} lists of blocks, and their order in the forward pass is not clear:"
        f" {'; '.join(seen)}; {advice}"
    )


def _modality(config: Any, model: nn.Module, stacks: int) -> Modality:
    """What the model is fed, from its main input and its class; UserError for what cannot be fed."""
    kind = type(model).__name__
    main = str(getattr(model, "main_input_name", ""))
    takes = inspect.signature(model.forward).parameters
    if main == "pixel_values" and getattr(config, "image_size", None) is not None:
        return Images()
    if main != "input_ids":
        raise UserError(
            f"{kind} is fed {main!r}; 'auto' feeds text (input_ids) and images (pixel_values of a known image_size):"
            " describe it with a plugin: see 'Add an architecture' in the README"
        )
    if "decoder_input_ids" in takes and stacks == 2:
        return EncoderDecoderText()
    return Text() if _predicts_next_token(config, kind) else EncoderText()


def _predicts_next_token(config: Any, class_name: str) -> bool:
    remote = getattr(config, "auto_map", None) or {}
    if class_name not in causal_classes().values() and "AutoModelForCausalLM" not in remote:
        return False
    # The head of an encoder family predicts next tokens only when the config makes a decoder of it.
    both = is_encoder_family(config.model_type)
    return bool(getattr(config, "is_decoder", False)) if both and hasattr(config, "is_decoder") else True


def _evaluation(modality: Modality) -> Evaluation:
    metrics: list[Metric] = [OutputError(modality)] if isinstance(modality, ComparableModality) else [Perplexity()]
    return Evaluation(*metrics, Footprint(lambda subject: run_once(subject, modality)))
