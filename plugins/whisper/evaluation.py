"""What says how good a Whisper is: word and character error rates after its own normaliser, speed and size."""

from lillama_core.evaluation import Evaluation
from lillama_registry import hookimpl

evaluation = Evaluation("whisper-error-rate", "whisper-real-time-factor", "whisper-footprint")


@hookimpl
def lillama_metrics() -> dict[str, str]:
    metrics = "lillama_plugins.whisper.metrics"
    return {
        "whisper-error-rate": f"{metrics}:error_rate",
        "whisper-real-time-factor": f"{metrics}:real_time_factor",
        "whisper-footprint": f"{metrics}:footprint",
    }
