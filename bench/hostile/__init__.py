"""Hostile calls of every raw op: wrong dtypes, strides and sizes, memory that is gone or shared, torch's defaults
changed midway. Each must raise an error with a message, or return what float64 arithmetic says.

    python -m bench.hostile                           2,000 calls of each op, seed 0
    python -m bench.hostile --seed 7 --minutes 60     other calls, seed after seed, for an hour
    python -m bench.hostile --ops decode --seed 3 --first 1234 --calls 1     one call again, as a fault names it
    make test-asan CALLS=20000                        the same under AddressSanitizer

calls.py draws valid calls, and spoil.py makes them hostile: a call depends on its op, seed and number alone. structs.py
calls the C++ extension by itself. truth.py judges results in NumPy, which torch's defaults do not reach. run.py makes
the calls in a process of their own, so that a crash is seen and named.
"""
