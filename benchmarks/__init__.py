"""The benchmark suite: models, methods and the commands that run them."""
