"""What the GPU backends share: sizes, error bounds and the order of the steps of each op; no kernel, and no Triton.

`steps` names what a backend has to compute itself, and `raw_ops` makes a backend's functions of it.
"""
