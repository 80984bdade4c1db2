"""`python -m bench.gpu`: checks and times the engine on a GPU, unattended, within a budget, a crash costing one case.

parent.py   goes through the plan, every job in a child process; no CUDA in here
plan.py     the jobs, most important first, and their sizes
child.py    runs the items of one job and reports each
checks.py   every op against float64 (check_codes.py, check_update.py, check_steps.py; the bound: truth.py)
timings.py  ops and whole steps, checked and then timed (spot.py checks at full size; cost.py counts bytes and flops)
report.py   the outputs: CSV and Markdown; draw.py: the plots
"""
