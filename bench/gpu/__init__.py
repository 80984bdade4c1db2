"""`python -m bench.gpu`: checks and times the engine on a GPU, unattended and within a budget; a crash costs one case.

parent.py   goes through the plan, every job in a child process; no CUDA in here; its options: options.py
plan.py     the jobs, most important first, and their sizes
child.py    runs the items of one job and reports each
checks.py   every op against float64 (check_codes.py, check_update.py, check_steps.py; the bound: truth.py)
op_times.py ops, checked and then timed, on the inputs of a case and on codes of every layout (layouts.py); sparse.py:
            the same by torch.sparse; timings.py: whole steps; spot.py checks at full size; cost.py: bytes and flops
overhead.py what a call costs the host
report.py   the outputs: CSV and Markdown (sections.py); draw.py: the plots
"""
