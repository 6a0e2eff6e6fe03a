"""The benchmark suite: models, methods and the commands that run them."""

from __future__ import annotations

from lillama_registry import LazyCommand, hookimpl


@hookimpl
def lillama_initializers() -> dict[str, str]:
    return {
        "activation-scaled": "lillama_benchmarks.baselines.asvd:ActivationScaled",
        "anchored": "lillama_benchmarks.baselines.aa_svd:Anchored",
        "channel-size": "lillama_benchmarks.baselines.wanda_sp:ChannelSize",
        "nystrom": "lillama_benchmarks.baselines.modegpt:Nystrom",
        "output-pca": "lillama_benchmarks.baselines.liteasr:OutputComponents",
        "whitened-update": "lillama_benchmarks.baselines.svd_llm_update:WhitenedUpdate",
    }


@hookimpl
def lillama_allocators() -> dict[str, str]:
    return {
        "bayesian-search": "lillama_benchmarks.baselines.bolaco:BayesianSearch",
        "block-influence": "lillama_benchmarks.baselines.modegpt:BlockInfluence",
        "effective-rank": "lillama_benchmarks.baselines.d_rank:EffectiveRank",
        "variance-threshold": "lillama_benchmarks.baselines.liteasr:VarianceThreshold",
    }


@hookimpl
def lillama_commands() -> dict[str, LazyCommand]:
    return {
        "benchmark": LazyCommand(
            "lillama_benchmarks.command:benchmark", "compress and measure the models of a suite by several methods"
        )
    }


__all__ = ["lillama_allocators", "lillama_commands", "lillama_initializers"]
