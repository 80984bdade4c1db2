"""`python -m bench.parallel`: one SAE on several processes of this machine, and what larger machines would exchange.

Measured, in turns: a FusedTrainStep of one process with all threads, and of as many processes of one thread that share
the batch or the dictionary: milliseconds, the share of them spent in exchanges (waiting for the others included), and
the bytes that each process received, beside what the formulas of bench/parallel/model.py say.
Writes bench/results/<device>/parallel.json and the tables of docs/distributed.md.
"""
