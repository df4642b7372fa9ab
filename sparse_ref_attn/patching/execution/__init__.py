"""The ways to save work, a file each: what a call's arguments become, and what its output becomes again."""
