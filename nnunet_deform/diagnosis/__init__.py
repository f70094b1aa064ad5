"""What ``status`` and ``check-images`` look for: one sentence for each thing that is wrong, and what to do about it.

Imports nothing, because :mod:`.installation` must be able to speak where other modules cannot be imported.
"""
