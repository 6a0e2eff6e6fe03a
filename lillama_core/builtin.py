"""What lillama brings itself, registered by the hooks that any plugin uses."""

from __future__ import annotations

from pathlib import Path

from lillama_registry import LazyCommand, hookimpl

CORE = "lillama_core"


@hookimpl
def lillama_targets() -> dict[str, str]:
    return {
        "linear": f"{CORE}.architecture.targets.linear:LinearTarget",
        "experts": f"{CORE}.architecture.targets.experts:ExpertsTarget",
        "shared-experts": f"{CORE}.architecture.targets.experts:SharedExpertsTarget",
        "convolution": f"{CORE}.architecture.targets.convolution:ConvolutionTarget",
        "grouped": f"{CORE}.architecture.targets.grouped:GroupedTarget",
        "sorted": f"{CORE}.architecture.targets.sorted_rows:SortedTarget",
        "embedding": f"{CORE}.architecture.targets.embedding:EmbeddingTarget",
        "banded-embedding": f"{CORE}.architecture.targets.embedding:BandedEmbeddingTarget",
    }


@hookimpl
def lillama_modalities() -> dict[str, str]:
    return {
        "text": f"{CORE}.data.text.modality:Text",
        "encoder-text": f"{CORE}.data.text.encoder:EncoderText",
        "encoder-decoder-text": f"{CORE}.data.text.encoder:EncoderDecoderText",
        "images": f"{CORE}.data.images.modality:Images",
    }


@hookimpl
def lillama_metrics() -> dict[str, str]:
    return {
        "perplexity": f"{CORE}.evaluation.metrics.perplexity:Perplexity",
        "accuracy": f"{CORE}.evaluation.metrics.zero_shot:ZeroShotAccuracy",
        "speed": f"{CORE}.evaluation.metrics.decoding:DecodeSpeed",
        "footprint": f"{CORE}.evaluation.metrics.decoding:Footprint",
        "answers": f"{CORE}.evaluation.metrics.answers:Answers",
    }


@hookimpl
def lillama_allocators() -> dict[str, str]:
    return {
        "uniform": f"{CORE}.allocation.uniform:Uniform",
        "bottom-first": f"{CORE}.allocation.depth:BottomFirst",
        "top-first": f"{CORE}.allocation.depth:TopFirst",
        "spectrum": f"{CORE}.allocation.spectrum:SpectrumAllocator",
    }


@hookimpl
def lillama_initializers() -> dict[str, str]:
    return {
        "svd": f"{CORE}.initialization.weights_only:PlainSVD",
        "random": f"{CORE}.initialization.weights_only:RandomInit",
        "whitened": f"{CORE}.initialization.second_moments:Whitened",
        "fisher": f"{CORE}.initialization.second_moments:Fisher",
    }


@hookimpl
def lillama_formats() -> dict[str, str]:
    return {
        "factored": f"{CORE}.formats.factored:Factored",
        "pivoted": f"{CORE}.formats.pivoted:Pivoted",
    }


@hookimpl
def lillama_losses() -> dict[str, str]:
    return {
        "l1+logcos": f"{CORE}.distillation.losses:L1LogCos",
        "mse": f"{CORE}.distillation.losses:MSE",
        "sensitivity": f"{CORE}.distillation.losses:Sensitivity",
    }


@hookimpl
def lillama_stages() -> dict[str, str]:
    stages = ("load", "calibrate", "statistics", "allocate", "blocks", "report", "heal", "write")
    return {stage: f"{CORE}.pipeline.stages.{stage}:{stage.capitalize()}Stage" for stage in stages}


@hookimpl
def lillama_recipes() -> dict[str, Path]:
    return {file.stem: file for file in sorted((Path(__file__).parent / "recipe" / "presets").glob("*.yaml"))}


@hookimpl
def lillama_exporters() -> dict[str, str]:
    return {
        "standalone": f"{CORE}.exporting.standalone:StandaloneExporter",
        "dense": f"{CORE}.exporting.dense:DenseExporter",
        "onnx": f"{CORE}.exporting.onnx_graphs:OnnxExporter",
    }


@hookimpl
def lillama_commands() -> dict[str, LazyCommand]:
    return {
        "compress": LazyCommand(f"{CORE}.cli.compress:compress", "make a model smaller"),
        "plan": LazyCommand(f"{CORE}.cli.plan:plan", "ranks, parameters and memory before anything is computed"),
        "finetune": LazyCommand(f"{CORE}.cli.finetune:finetune", "train a compressed model as a whole"),
        "export": LazyCommand(f"{CORE}.cli.export:export", "write a compressed model for use without lillama"),
        "analyze": LazyCommand(f"{CORE}.cli.analyze:analyze", "predict what a model loses, and by which of its maps"),
        "quantize": LazyCommand(f"{CORE}.cli.quantize:quantize", "hold a model's weights in 8 or 4 bits"),
        "evaluate": LazyCommand(f"{CORE}.cli.evaluate:evaluate", "measure a model, beside another one"),
        "verify": LazyCommand(f"{CORE}.cli.verify:verify", "check a compressed directory without running it"),
        "reproduce": LazyCommand(f"{CORE}.cli.reproduce:reproduce", "repeat a run from its record, compare the files"),
        "doctor": LazyCommand(f"{CORE}.cli.doctor:doctor", "what is installed, what works here, what to install"),
        "bench": LazyCommand(f"{CORE}.cli.bench:bench", "compare a compressed model's speed with the dense one's"),
        "plugins": LazyCommand(f"{CORE}.cli.plugins:plugins", "list plugins, what each provides and where it is from"),
        "strategies": LazyCommand(f"{CORE}.cli.strategies:strategies", "list what can be chosen, with its options"),
        "completion": LazyCommand(f"{CORE}.cli.completion:completion", "print the script of a shell's completion"),
    }
