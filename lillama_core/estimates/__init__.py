"""What a compression will need, told from shapes alone: memory, disk and time, on this machine or a named one."""
