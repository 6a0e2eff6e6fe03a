"""End-to-end training of a compressed model: all of its blocks together, by the predictions of the dense one."""
