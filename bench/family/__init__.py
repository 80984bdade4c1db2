"""`python -m bench.family`: every rule of the family against its dense version.

--part speed    a whole training step of each rule against the dense one, in turns, checked before it is timed
--part quality  FVU against L0 on real activations, three sparsities of each rule, beside the dense curve
Both write each finished entry to bench/results/<device>/family and continue where they were stopped.
"""
