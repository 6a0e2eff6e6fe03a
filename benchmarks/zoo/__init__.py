"""The models that the suite compresses, by name: ``fetch("smollm2-135m")`` is a directory in transformers' layout."""

from lillama_benchmarks.zoo.catalogue import ZooModel, fetch, models

__all__ = ["ZooModel", "fetch", "models"]
