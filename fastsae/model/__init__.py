"""The SAE as an `nn.Module`: sae.py is the place to start, rules/ says which latents are active."""
