"""Checkpoints of other libraries: registry.py recognises, reads and writes them, with one small module per library.

No converter imports the library whose files it reads: state dicts and settings are mapped, in docs/interop.md's terms.
"""
