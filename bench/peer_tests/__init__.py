"""Other libraries' own tests, run twice: as they are, and with what they make accelerated.

    python -m bench.peer_tests --tests SAELENS=~/SAELens DICTIONARY_LEARNING=~/dictionary_learning
    python -m bench.peer_tests --tests ... --store    renews bench/results/peers/tests.json and docs/interop.md's table
    python -m bench.peer_tests --draw                 only renews the table, from the stored file

`make test-peers` and `make peers-report` are the first and the second. Nothing of these libraries is in this
repository: their tests are read from a clone, or from their source archive where that holds them.
"""
