"""This machine: devices, memory, files, progress, interrupts, random streams."""
