"""Processes that we start, follow and end: nnU-Net's commands, and code that may crash."""
