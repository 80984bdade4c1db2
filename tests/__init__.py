"""The test suite. It mirrors fastsae/. All tests share cases.py and truth.py; bench shares cases.py too."""
