"""Mixture-of-experts language models whose experts are fused into three-dimensional parameters."""
