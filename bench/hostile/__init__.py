"""Hostile cases for everything that a user can reach. Each must raise a clear error, or give the result of float64
arithmetic or of an undisturbed run.

    python -m bench.hostile --minutes 60              all parts for an hour; renews docs/reliability.md
    python -m bench.hostile --parts files --cases 50  50 cases of each kind of a part
    python -m bench.hostile --parts calls/decode --seed 3 --first 1234 --cases 1    one case again, as a fault names it
    make test-asan CALLS=20000                        the calls under AddressSanitizer

    calls          ops.py: every raw op, and the C++ extension by itself (structs.py). calls.py draws valid calls,
                   spoil.py makes them hostile, truth.py judges results in NumPy, which torch's defaults do not reach
    modules        modules.py: modules, training steps and optimizers; dense.py is their truth in float64
    files          files.py: damaged, missing, swapped and outdated files
    interruptions  interruptions.py: kill -9, full disks, two writers

A case depends only on its kind, seed and number. run.py runs the cases in a separate process, so that a crash is
noticed and named; page.py stores and shows the results.
"""
