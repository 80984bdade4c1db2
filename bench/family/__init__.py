"""The family of SAEs against its dense versions: speed at one size (`speed.py`), quality on real activations."""
