"""The test suite. It mirrors fastsae/; cases.py and truth.py are shared by all of it, and cases.py by bench."""
