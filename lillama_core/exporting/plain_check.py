"""Run by path in a process without lillama: does a directory of transformers give the outputs that it should?

    plain_check.py FOLDER PROBE CLASS [--trust-remote-code | --gguf FILE]

loads FOLDER as a user does, and prints as JSON how far its outputs are from those expected, relative to their norm.
With ``--trust-remote-code`` it also tells whether the directory is refused without the flag, and whether it holds the
same after ``save_pretrained``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


def main(folder: str, probe: str, class_name: str, *flags: str) -> None:
    """Print a JSON object: name of what was compared -> difference."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    saved = load_file(probe)
    inputs = {k.removeprefix("inputs."): v for k, v in saved.items() if k.startswith("inputs.")}
    expected = {k.removeprefix("expected."): v for k, v in saved.items() if k.startswith("expected.")}
    options: dict[str, Any] = {}
    if flags[:1] == ("--gguf",):
        options["gguf_file"] = flags[1]
    remote = flags[:1] == ("--trust-remote-code",)
    found: dict[str, float] = {}
    if remote:
        options["trust_remote_code"] = True
        found["refusal without trust_remote_code"] = float(not refused(folder, class_name))
    model = loaded(folder, class_name, options)
    found["logits"] = difference(output(model, inputs), expected["logits"])
    if remote:
        found["logits after save_pretrained"] = difference(again(model, class_name, inputs), expected["logits"])
        del model
        if "states" in expected:
            base = loaded(folder, "AutoModel", options)
            found["states of AutoModel"] = difference(output(base, inputs), expected["states"])
    print(json.dumps(found))


def loaded(folder: str, class_name: str, options: dict[str, Any]) -> Any:
    model, notes = getattr(transformers, class_name).from_pretrained(
        folder, dtype="auto", output_loading_info=True, **options
    )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wrong = sorted(set(notes["missing_keys"]) & parameters)
    if class_name != "AutoModel":  # which has no head
        wrong += sorted(notes["unexpected_keys"])
    if wrong:
        sys.exit(f"weights are missing or left over, such as {wrong[0]}")
    in_fp32(model)
    return model.eval()


def in_fp32(model: Any) -> None:
    """Let ``model`` compute in fp32 whatever its weights are stored in; of its blocks one at a time is in fp32.

    In half precision the rounding of activations would hide what an export has changed.
    """
    blocks = list(outermost_blocks(model))
    inside = {id(t) for block in blocks for t in tensors_of(block)}
    for tensor in tensors_of(model):
        if id(tensor) not in inside:
            tensor.data = tensor.data.float()
    for block in blocks:
        stored = [(tensor, tensor.data) for tensor in tensors_of(block)]
        block.register_forward_pre_hook(partial(as_fp32, stored))
        block.register_forward_hook(partial(as_stored, stored))


def outermost_blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            # What is never called (a band of a table, say) is no block: nothing would tell that it is needed.
            yield from (block for block in child if type(block).forward is not torch.nn.Module.forward)
        else:
            yield from outermost_blocks(child)


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


Stored = list[tuple[torch.Tensor, torch.Tensor]]


def as_fp32(stored: Stored, *_: Any) -> None:
    for tensor, data in stored:
        tensor.data = data.float()


def as_stored(stored: Stored, *_: Any) -> None:
    for tensor, data in stored:
        tensor.data = data


def refused(folder: str, class_name: str) -> bool:
    try:
        getattr(transformers, class_name).from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        return True
    return False


def again(model: Any, class_name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output of the model after it was saved by transformers and loaded once more."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return output(loaded(folder, class_name, {"trust_remote_code": True}), inputs)


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs)
    logits = getattr(found, "logits", None)
    tensor: torch.Tensor = found[0] if logits is None else logits
    return tensor.float()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        sys.exit(f"the outputs have the shape {list(found.shape)} instead of {list(expected.shape)}")
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main(*sys.argv[1:])
