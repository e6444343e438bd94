"""The commands: each file parses, builds and runs one."""
