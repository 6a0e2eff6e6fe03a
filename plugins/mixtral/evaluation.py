"""What says how good a mixture of experts is: what a language model is asked, and where its tokens go."""

from lillama_core.evaluation import Evaluation, language_model_evaluation
from lillama_registry import hookimpl

evaluation = Evaluation(*language_model_evaluation.declared, "routing")


@hookimpl
def lillama_metrics() -> dict[str, str]:
    return {"routing": "lillama_plugins.mixtral.routing:Routing"}
