"""Text that the model writes itself."""
