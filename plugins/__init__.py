"""Built-in architecture plugins of lillama, one package each."""
