"""Run by path in a process without lillama: do the graphs in a directory give the outputs that they should?

    onnx_check.py FOLDER PROBE

runs them by ONNX Runtime, and prints as JSON how far their outputs are from those expected, relative to their norm. A
graph with a cache is also run in two steps, of which the second gets the cache of the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
Arrays = dict[str, Any]


class Graph:
    """A graph that runs."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.outputs = [found.name for found in self.session.get_outputs()]

    @property
    def has_cache(self) -> bool:
        return any(given.name.startswith("past_key_values.") for given in self.session.get_inputs())

    def empty_cache(self, rows: int) -> Arrays:
        """A cache of length 0 for ``rows`` texts."""
        found = {}
        for given in self.session.get_inputs():
            if given.name.startswith("past_key_values."):
                _, heads, _, width = given.shape
                found[given.name] = np.zeros((rows, heads, 0, width))
        return found

    def __call__(self, values: Arrays) -> Arrays:
        feed = {given.name: values[given.name].astype(TYPES[given.type]) for given in self.session.get_inputs()}
        return dict(zip(self.outputs, self.session.run(None, feed), strict=True))


def main(folder: str, probe: str) -> None:
    """Print a JSON object: name of what was compared -> difference."""
    saved = load_file(probe)
    inputs = {k.removeprefix("inputs."): v for k, v in saved.items() if k.startswith("inputs.")}
    expected = saved["expected.logits"]
    if (Path(folder) / "encoder_model.onnx").is_file():
        states = Graph(Path(folder) / "encoder_model.onnx")(inputs)["last_hidden_state"]
        found = Graph(Path(folder) / "decoder_model.onnx")({**inputs, "encoder_hidden_states": states})
        print(json.dumps({"logits": difference(found["logits"], expected)}))
        return
    graph = Graph(Path(folder) / "model.onnx")
    if "input_ids" in inputs:
        inputs.setdefault("attention_mask", np.ones_like(inputs["input_ids"]))
    if not graph.has_cache:
        print(json.dumps({"logits": difference(graph(inputs)["logits"], expected)}))
        return
    rows, length = inputs["input_ids"].shape
    whole = graph({**inputs, **graph.empty_cache(rows)})["logits"]
    half = length // 2
    first = graph({name: value[:, :half] for name, value in inputs.items()} | graph.empty_cache(rows))
    cache = {name.replace("present.", "past_key_values."): v for name, v in first.items() if name != "logits"}
    second = graph({**cache, "input_ids": inputs["input_ids"][:, half:], "attention_mask": inputs["attention_mask"]})
    both = np.concatenate([first["logits"], second["logits"]], axis=1)
    print(
        json.dumps(
            {"logits": difference(whole, expected), "logits by two steps with a cache": difference(both, expected)}
        )
    )


def difference(found: Any, expected: Any) -> float:
    if found.shape != expected.shape:
        sys.exit(f"the outputs have the shape {list(found.shape)} instead of {list(expected.shape)}")
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main(*sys.argv[1:])
