"""A file for each command: its arguments, and which function runs it."""
