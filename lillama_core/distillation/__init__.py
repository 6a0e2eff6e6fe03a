"""Teaching a block of factors to do what the dense block does: losses, training, closed-form correction."""
