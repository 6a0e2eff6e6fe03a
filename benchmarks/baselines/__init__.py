"""Published methods, built as strategies beside the core's own, to be compared with at equal parameters and data."""
