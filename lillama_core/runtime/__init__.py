"""Running blocks one at a time: the harness around a stack, recorded arguments, weights by the block."""
