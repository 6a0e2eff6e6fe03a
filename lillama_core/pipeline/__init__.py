"""A compression from beginning to end, stage by stage."""
