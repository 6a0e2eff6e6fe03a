"""What says how good a language model is: perplexity, zero-shot accuracy, speed of decoding and size."""

from lillama_core.evaluation import language_model_evaluation as evaluation

__all__ = ["evaluation"]
