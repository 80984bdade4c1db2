"""`python -m bench.gpu`: times the engine on a GPU within a budget, after a selection of its tests has passed there.

__main__.py  the options      run.py     the parent: jobs in order, in processes of their own, within the time
plan.py      what is run      child.py   one job's process        store.py  results, which of them hold, the archive
machine.py   builds what is missing, says what this machine is, and measures what its tensor cores lose
checks.py    tests, graphs and compute-sanitizer      ceilings.py  the device's best rates      cost.py  least costs
steps.py     whole training steps, ours and others    op_times.py  single ops      profiles.py  a step's kernels
clock.py     time on a device     layouts.py  codes of every layout     report.py  summary.md
"""
